"""What commands say while they work and at their end: how far they are, what they did, and nothing besides."""

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from small_runs import SMALL_SQUARES

from elt_lightning.cli import main
from elt_lightning.commands import train
from elt_lightning.training import announce, meter

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
FIT = ["fit", "--config", str(QUICKSTART), *SMALL_SQUARES]


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def work_beside(small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of each test's own that has the data of the trained model."""
    (tmp_path / "data").symlink_to(small_squares.parents[3] / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meter, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(meter, "EVERY_SECONDS_ON_TERMINALS", 0.0)


def test_a_sweep_and_a_prediction_say_how_far_they_are(small_squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt_path", str(small_squares), "--num_samples=12"]
    assert main(["test", *flags, "--loops=1,3", "--loop_metrics.batch_size=6", "--run_dir=swept"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample ")]
    assert [re.sub(r"\d+\.\d samples/s  \d+ s left$", "…", line) for line in lines] == [
        f"sample {done}/24  loops {loops}, steps 3, guidance 1  …"
        for done, loops in ((6, 1), (12, 1), (18, 3), (24, 3))
    ]
    flags += ["--loops=2", "--samples.batch_size=5", "--trainer.limit_predict_batches=2", "--run_dir=drawn"]
    assert main(["predict", *flags]) == 0
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"sample 5/10  loops 2  \d+\.\d samples/s  \d+ s left", first)
    assert second.startswith("sample 10/10")
    assert last == "10 samples, of 12 asked for, in drawn/samples.npz"
    assert len(np.load("drawn/samples.npz")["arr_0"]) == 10
    assert main(["predict", *flags, "--samples.format=png", "--run_dir=pictures"]) == 0
    assert capsys.readouterr().out.endswith("10 pictures, of 12 asked for, in pictures/samples\n")
    assert main(["predict", *flags, "--trainer.limit_predict_batches=0"]) == 2


def test_long_work_says_beforehand_what_it_takes(
    small_squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is drawn otherwise for it. What counts as long is brought down to what a test has time for."""
    flags = ["--ckpt_path", str(small_squares)]
    assert main(["predict", *flags, "--num_samples=12", "--run_dir=unsaid"]) == 0
    monkeypatch.setattr(announce, "LONG", 0)
    monkeypatch.setattr(train, "MOST_REHEARSED", 1)
    capsys.readouterr()
    for arguments, what in (
        (["predict", *flags, "--num_samples=12", "--run_dir=said"], "predict"),
        (["test", *flags, "--num_samples=12", "--loops=1", "--run_dir=swept"], "test"),
        (["sample", *flags, "--num=1"], "L = 4"),
        (
            [*FIT, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"],
            "a pass of 16 samples at max_loops 4, 0.0 GiB",
        ),
    ):
        assert main(arguments) == 0
        line = rf"^{what}: [\d.e+]+ floating-point operations a device, about [\d:]+ [sh] on this CPU$"
        assert re.search(line, capsys.readouterr().err, re.MULTILINE)
    said, unsaid = (np.load(f"{name}/samples.npz")["arr_0"] for name in ("said", "unsaid"))
    np.testing.assert_array_equal(said, unsaid)


@pytest.mark.parametrize("terminal", [False, True])
def test_training_shows_all_its_steps_and_the_scores_of_each_validation(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of four steps; a bar has the same text as a line."""
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    assert main([*FIT, "--trainer.max_steps=8", "--trainer.val_check_interval=6", "--run_dir=run"]) == 0
    text = re.sub(r"\x1b\[[\d;?]*\w", "", out.getvalue()).replace("\r", "\n")
    assert [int(step) for step in re.findall(r"^step (\d)/8  loss \d+\.\d+  [\d.]+ steps/s  ", text, re.MULTILINE)] == (
        [8] if terminal else list(range(1, 9))
    )
    assert not terminal or re.search(r"━ step 8/8  loss \d+\.\d+  [\d.]+ steps/s  0 s left", text)
    for loops in range(1, 5):
        name = f"validation at step 6  L{loops}"
        assert re.search(
            rf"^{name}  loss \S+  valid_squares \S+  valid_lines \S+  fd_digits \S+\s*$", text, re.MULTILINE
        )
    assert "trained 8 steps: run/checkpoints/last.ckpt" in text


def test_a_validation_of_its_own_prints_its_scores(small_squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--ckpt_path", str(small_squares), "--loops=2", "--run_dir=judged"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("validation  "))
    assert re.match(r"validation  L2  loss \d", line)


def test_closing_lines_of_training_say_what_was_done(small_squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--trainer.fast_dev_run=true", "--run_dir=tried"]) == 0
    assert capsys.readouterr().out.endswith("trained 1 step, and wrote no checkpoint, as it was told\n")
    assert not Path("tried/checkpoints").exists()
    flags = [f"--ckpt_path={small_squares}", "--trainer.max_steps=2", "--run_dir=none"]
    assert main([*FIT, *flags]) == 0
    *_, done, following = capsys.readouterr().out.splitlines()
    assert done == f"nothing was left to train: {small_squares} has 6 steps"
    assert following == f"next: elt test --ckpt_path {small_squares}"


def test_a_resumed_training_with_short_epochs_logs_its_speed_and_warns_of_nothing() -> None:
    """Epochs of four steps, logged every five; it goes on in the midst of an epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addHandler(handler)
    settings = [*FIT, "--run_dir=run", "--trainer.log_every_n_steps=5", "--trainer.limit_val_batches=0"]
    try:
        with warnings.catch_warnings(record=True) as warned:
            assert main([*settings, "--trainer.max_steps=10"]) == 0
            last = "run/checkpoints/last.ckpt"
            assert main([*settings, "--trainer.max_steps=15", f"--ckpt_path={last}"]) == 0
            assert main(["predict", f"--ckpt_path={last}", "--num_samples=2"]) == 0
    finally:
        log.removeHandler(handler)
    assert [str(each.message) for each in warned if "lightning" in each.filename] == []
    assert {line.partition(":")[0] for line in said} <= {
        "GPU available",
        f"Restoring states from the checkpoint path at {last}",
    }
    assert not list(Path("run").rglob("hparams.yaml"))
    events = EventAccumulator("run")
    events.Reload()
    assert len(events.Scalars("train/samples_per_second")) == 3


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119.4, "119 s"), (3725, "1:02:05 h")])
def test_times_are_written_as_they_are_read(seconds: float, text: str) -> None:
    assert meter.duration(seconds) == text

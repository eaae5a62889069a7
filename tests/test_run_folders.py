"""Where a run's files lie, whatever its loggers, its checkpoint, the folder it is called from and the file system."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from small_runs import SMALL_SQUARES

from elt_lightning.cli import main
from elt_lightning.training.charts import log_table
from elt_lightning.training.checkpointing import name_again
from elt_lightning.training.runs import locked, log_picture, run_of

CONFIGS = Path(__file__).parent.parent / "configs"
FIT = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), *SMALL_SQUARES, "--trainer.max_steps=2"]
FIT += ["--trainer.val_check_interval=2"]

LOGGERS = """
trainer:
  logger:
  - class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: logs}
  - class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: logs}
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, two below one that nothing may be written into."""
    folder = tmp_path / "above" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def with_data(small_squares: Path, elsewhere: Path) -> Path:
    """A working folder that has the data of Latin squares."""
    shutil.copytree(small_squares.parents[3] / "data", elsewhere / "data")
    return elsewhere


@pytest.mark.parametrize("loggers", [LOGGERS, "trainer: {logger: false}"], ids=["two loggers", "none"])
def test_checkpoints_and_results_lie_in_the_run_whatever_the_loggers(loggers: str, with_data: Path) -> None:
    Path("loggers.yaml").write_text(loggers)
    assert main([*FIT, "--config=loggers.yaml", "--run_dir=run"]) == 0
    last = "run/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    if loggers != LOGGERS:
        return
    assert main([*FIT, "--config=loggers.yaml", "--run_dir=run"]) == 2  # it holds a run
    assert main(["test", "--config=loggers.yaml", "--ckpt_path", last, "--loops=1", "--num_samples=12"]) == 0
    assert main(["predict", "--config=loggers.yaml", "--ckpt_path", last, "--num_samples=2"]) == 0
    assert Path("run/test_0/loops.json").is_file()
    assert Path("run/predict_0/samples.npz").is_file()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(min(Path("logs").rglob("events.out.*")).parent))  # of the first command
    events.Reload()
    assert "val/samples" in events.Tags()["images"]  # shown by the second logger too
    assert "val/valid_squares@L4" in events.Tags()["scalars"]


def test_weights_and_biases_is_shown_pictures_offline(elsewhere: Path) -> None:
    pytest.importorskip("wandb")

    class OneLogger:
        is_global_zero, global_step, loggers = True, 3, [WandbLogger(offline=True)]

    log_picture(OneLogger, "val/samples", torch.zeros(4, 6, dtype=torch.uint8))  # type: ignore[arg-type]
    log_table(OneLogger, "test/loops", ["loops", "score"], [["1", "0.5"]])  # type: ignore[arg-type]
    assert len(list(elsewhere.glob("wandb/offline-run-*/files/media/images/val/samples_*.png"))) == 1
    assert len(list(elsewhere.glob("wandb/offline-run-*/files/media/table/test/loops_*.json"))) == 1


def test_a_folder_at_work_is_refused_until_its_process_is_gone(
    with_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_locked, lock_it = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(Path("run")):
            os.write(lock_it, b"!")
            signal.pause()
    try:
        os.read(is_locked, 1)
        assert main([*FIT, "--run_dir=run"]) == 2
        assert f"run is in use by process {child} on " in capsys.readouterr().err
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert main([*FIT, "--run_dir=run"]) == 0


def test_a_checkpoint_outside_of_runs_gets_a_run_and_data_are_found_where_it_was_made(
    small_squares: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(small_squares, "model.ckpt")
    assert main(["test", "--ckpt_path=model.ckpt", "--loops=1", "--num_samples=12"]) == 0
    assert Path("runs/model_0/loops.json").is_file()
    assert main(["sample", "--ckpt_path=model.ckpt", "--num=1"]) == 0  # its tokenizer is found there too
    assert main(["fit", "--ckpt_path=model.ckpt", "--trainer.max_steps=7"]) == 0
    assert Path("runs/model_1/checkpoints/last.ckpt").is_file()
    assert "made " not in capsys.readouterr().out
    assert os.listdir(elsewhere.parent) == [elsewhere.name]
    assert not Path("data").exists()
    assert run_of("checkpoints/model.ckpt") is None  # a folder of that name is not yet a run
    assert run_of(small_squares) == small_squares.parent.parent


def test_data_that_are_not_where_the_run_was_made_are_found_here_and_what_is_made_is_said(
    small_squares: Path, with_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(small_squares, weights_only=True)
    assert content["elt"]["folder"] == str(small_squares.parents[3])
    content["elt"]["folder"] = str(with_data / "gone")
    torch.save(content, "model.ckpt")
    codebook = next(Path("data/latin_squares").glob("codebook_*"))
    codebook.unlink()
    assert main(["test", "--ckpt_path=model.ckpt", "--loops=1", "--num_samples=12"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "made" in line] == [
        f"made {codebook}: the codebook"
    ]


def none_here(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("missing", [("symlink",), ("symlink", "link")], ids=["hard link", "copy"])
def test_training_needs_no_symbolic_links(
    missing: tuple[str, ...], with_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setattr(os, name, none_here)
    assert main([*FIT, "--run_dir=run", "--checkpoint.every_n_train_steps=1"]) == 0
    last = Path("run/checkpoints/last.ckpt")
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "step_2.ckpt"]
    assert not last.is_symlink()
    assert main(["fit", f"--ckpt_path={last}", "--trainer.max_steps=3"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_a_folder_has_a_second_name_without_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sharded checkpoints need it."""
    monkeypatch.setattr(os, "symlink", none_here)
    for step in "12":
        (tmp_path / step).mkdir()
        (tmp_path / step / "shard").write_text(step)
        name_again(tmp_path / step, tmp_path / "last")
    assert (tmp_path / "last" / "shard").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "last"]


@pytest.mark.slow
def test_a_tokenizer_goes_on_from_its_checkpoint_alone(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ["--config", str(CONFIGS / "quickstart_video_tokenizer.yaml")]
    small = ["--model.init_args.filters=4", "--data.init_args.training_videos=8", "--data.init_args.val_videos=4"]
    once = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    assert main(["fit", *config, *small, *once, "--run_dir=run"]) == 0
    last = "--ckpt_path=run/checkpoints/last.ckpt"
    assert main(["fit", last, *once, "--trainer.max_steps=2"]) == 0
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    assert content["elt"]["model"]["init_args"]["filters"] == 4

    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "not for tokenizers" in refused("test", last)
    assert "of a tokenizer" in refused("sample", last)
    assert "of a tokenizer" in refused("export", last, "--output=exported")
    assert "one trains a tokenizer" in refused("fit", last, "--config", str(CONFIGS / "quickstart.yaml"))

"""Training that is ended from outside, by SIGTERM, Ctrl-C or a full disk: what was trained is not lost."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from small_runs import SMALL
from test_command_line import assert_same

from elt_lightning.cli import main
from elt_lightning.signals import handle_signals
from elt_lightning.training.module import ELTModule
from elt_lightning.training.preemption import Preemption

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
SETTINGS = ["--config", str(DIGITS), *SMALL, "--data.init_args.batch_size=64", "--data.init_args.micro_batch_size=32"]
SETTINGS += ["--trainer.accelerator=cpu", "--trainer.max_steps=30", "--trainer.val_check_interval=12"]
SETTINGS += ["--data.init_args.root=../digits"]


class Sender(Callback):
    """Sends this process a signal in one micro-batch of training, counted from 0, or of validation or test."""

    def __init__(self, training: int | None = None, number: int = signal.SIGTERM) -> None:
        self.training, self.number, self.seen = training, number, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.training:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.training is None:
            os.kill(os.getpid(), self.number)

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("preemption") / "whole"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *SETTINGS, "--run_dir=run"]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def folder(whole: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of each test's own, beside that of the data that all share."""
    path = whole.parents[3] / str(request.node.name).partition("[")[0]
    while path.exists():
        path = path.with_name(f"{path.name}_")
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def sending(training: int | None = None, number: int = signal.SIGTERM) -> str:
    """A setting that has a :class:`Sender` among the trainer's callbacks."""
    settings = f"training: {'null' if training is None else training}, number: {int(number)}"
    return f"--trainer.callbacks=[{{class_path: {__name__}.Sender, init_args: {{{settings}}}}}]"


def elt(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    """Start the program, in a group of processes of its own."""
    command = [sys.executable, "-m", "elt_lightning", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **settings
    )


def resume_and_compare(whole: Path, last: Path) -> None:
    assert main(["fit", *SETTINGS, "--run_dir=run", f"--ckpt_path={last}"]) == 0
    expected, found = (torch.load(path, weights_only=True) for path in (whole, last))
    assert found["global_step"] == 30
    for name in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert_same(expected[name], found[name])


TWO_DEVICES = ["--trainer.devices=2", "--trainer.strategy=ddp"]
A_LOADER = ["--data.init_args.num_workers=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "to_all", "number"),
    [
        pytest.param([], False, signal.SIGTERM, id="alone"),
        pytest.param(A_LOADER, True, signal.SIGTERM, id="with its loader process"),
        pytest.param(A_LOADER, True, signal.SIGINT, id="with its loader process, Ctrl-C"),
        pytest.param(TWO_DEVICES, False, signal.SIGTERM, id="the first of two"),
        pytest.param(TWO_DEVICES, True, signal.SIGINT, id="two, Ctrl-C"),
    ],
)
def test_a_terminated_program_saves_its_step_and_resumes_to_the_same_weights(
    settings: list[str], to_all: bool, number: signal.Signals, whole: Path, folder: Path
) -> None:
    """The signal comes from outside, some time after the fourth of 30 steps, to the program or to all its processes."""
    last = folder / "run" / "checkpoints" / "last.ckpt"
    settings = [*SETTINGS, *settings, "--checkpoint.every_n_train_steps=2", "--run_dir=run"]
    process = elt("fit", *settings)
    try:
        wait_for(last.parent / "step_4.ckpt", process)
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    step = torch.load(last, weights_only=True)["global_step"]
    assert 4 <= step < 30
    (line,) = (line for line in error.splitlines() if line.startswith("elt: ended by "))
    assert f"step {step} is saved, go on with --ckpt_path " in line
    assert Path(line.rpartition(" ")[2]).resolve() == last.resolve()
    if TWO_DEVICES[0] not in settings:
        resume_and_compare(whole, last)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    latest = time.monotonic() + 120
    while process.poll() is None and not path.exists() and time.monotonic() < latest:
        time.sleep(0.005)
    assert path.exists(), process.poll()


@pytest.mark.slow
def test_a_loader_process_does_not_outlive_the_program(folder: Path) -> None:
    """It ignores SIGTERM; killed without warning, the program cannot tell it to end."""
    process = elt("fit", *SETTINGS, *A_LOADER, "--checkpoint.every_n_train_steps=2", "--run_dir=run")
    try:
        wait_for(folder / "run" / "checkpoints" / "step_4.ckpt", process)
        process.kill()
        process.wait()
        latest = time.monotonic() + 60
        while members(process.pid) and time.monotonic() < latest:
            time.sleep(0.1)
        assert not members(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def members(group: int) -> list[int]:
    """Processes of a group that run still, those aside that nobody has waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            found += [int(stat.parent.name)] if int(its_group) == group and state != "Z" else []
    return found


@pytest.mark.parametrize(
    ("training", "number", "saved"),
    [
        pytest.param(6, signal.SIGTERM, 4, id="first half", marks=pytest.mark.slow),
        pytest.param(7, signal.SIGTERM, 4, id="second", marks=pytest.mark.slow),
        pytest.param(7, signal.SIGINT, 4, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(None, signal.SIGTERM, 12, id="validation", marks=pytest.mark.slow),
    ],
)
def test_a_signal_takes_effect_between_steps(
    training: int | None,
    number: signal.Signals,
    saved: int,
    whole: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step is two micro-batches; the one that the signal comes in is finished. Validation is not."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SETTINGS, sending(training, number), "--run_dir=run"])
    assert ended.value.code == 128 + number
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"elt: ended by {name}: step {saved} is saved" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    last = folder / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved
    resume_and_compare(whole, last)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_sampling_of_a_validation_after_its_batch(
    number: signal.Signals, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four loop counts would take two batches."""
    sample, drawn = ELTModule.sample, 0

    def interrupted(*arguments: Any, **settings: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        if drawn == 3:
            os.kill(os.getpid(), number)
        return sample(*arguments, **settings)

    monkeypatch.setattr(ELTModule, "sample", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SETTINGS, "--run_dir=run", "--loop_metrics.batch_size=2"])
    assert (ended.value.code, drawn) == (128 + number, 3)
    monkeypatch.setattr(ELTModule, "sample", sample)
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    resume_and_compare(whole, folder / "run" / "checkpoints" / "last.ckpt")


def test_a_second_interrupt_ends_at_once() -> None:
    """In a process of its own, which does nothing between the two."""
    child = os.fork()
    if child == 0:
        handle_signals(Preemption()._take_note)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.slow
def test_a_step_that_is_saved_already_is_not_saved_again(folder: Path) -> None:
    """The signal comes in validation, and the step before it was saved."""
    with pytest.raises(SystemExit):
        main(["fit", *SETTINGS, sending(), "--run_dir=run", "--checkpoint.every_n_train_steps=12"])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["last.ckpt", "step_12.ckpt"]


@pytest.mark.parametrize(
    ("command", "number"), [("validate", signal.SIGTERM), ("test", signal.SIGTERM), ("test", signal.SIGINT)]
)
def test_what_does_not_train_ends_at_once_with_the_same_status(
    command: str, number: signal.Signals, whole: Path, folder: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--ckpt_path", str(whole), "--loops=1", sending(number=number), "--run_dir=run"])
    assert ended.value.code == 128 + number
    assert not Path("run/loops.json").exists()


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, saved = torch.save, 0

    def until_full(*arguments: Any, **settings: Any) -> None:
        nonlocal saved
        saved += 1
        if saved > 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **settings)

    monkeypatch.setattr(torch, "save", until_full)
    assert main(["fit", *SETTINGS, "--run_dir=run", "--checkpoint.every_n_train_steps=2"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("elt: error: "))
    assert "No space left on device; what was finished before is whole" in line
    check_the_last_is_good(folder, 4)


@pytest.mark.slow
def test_a_disk_that_takes_half_a_checkpoint_leaves_none_of_it(whole: Path, folder: Path) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the middle of the file."""
    assert main(["fit", *SETTINGS, "--run_dir=run", "--trainer.max_steps=2"]) == 0
    size = whole.stat().st_size // 2
    last = "--ckpt_path=run/checkpoints/last.ckpt"
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
    assert "File too large" in refused(elt("fit", *SETTINGS, "--run_dir=run", last, **limited))
    check_the_last_is_good(folder, 2)
    assert main(["fit", *SETTINGS, "--run_dir=run", last, "--trainer.max_steps=4"]) == 0
    check_the_last_is_good(folder, 4)


def refused(process: subprocess.Popen[str]) -> str:
    """The one line of a program that must refuse."""
    _, error = process.communicate(timeout=180)
    assert process.returncode == 2, error
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("elt: error: "))
    return line


def may_mount() -> bool:
    """Whether this user may have a file system of their own."""
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.run([unshare, *MOUNTED, "-c", "true"], capture_output=True).returncode


MOUNTED = ["--user", "--map-root-user", "--mount", "sh"]
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs run && cp -a whole/. run && shift && "$@"; status=$?; cp -a run/. left; '


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs a file system of its own, for which this user may not ask")
@pytest.mark.parametrize("room", [0.5, 1.5], ids=["no room for a second", "no room for a third"])
def test_a_disk_that_is_full_indeed(room: float, whole: Path, folder: Path) -> None:
    """A disk of a few hundred KiB, seen by the program alone: room for so many checkpoints beside the first."""
    assert main(["fit", *SETTINGS, "--run_dir=whole", "--trainer.max_steps=2"]) == 0
    Path("run").mkdir()
    size = sum(path.stat().st_size for path in Path("whole").rglob("*") if not path.is_symlink())
    size += int(room * whole.stat().st_size) + 40_000
    program = [sys.executable, "-m", "elt_lightning", "fit", *SETTINGS, "--checkpoint.every_n_train_steps=2"]
    program += ["--checkpoint.save_top_k=-1", "--run_dir=run", "--ckpt_path=run/checkpoints/last.ckpt"]
    process = subprocess.Popen(
        ["unshare", *MOUNTED, "-c", MOUNT + "exit $status", "sh", str(size), *program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "No space left on device" in refused(process)
    steps = sorted(int(path.stem.removeprefix("step_")) for path in Path("left/checkpoints").glob("step_*"))
    assert steps == ([2] if room < 1 else [2, 4])
    found = torch.load("left/checkpoints/last.ckpt", weights_only=True)
    assert found["global_step"] == steps[-1]


def check_the_last_is_good(folder: Path, step: int) -> None:
    checkpoints = folder / "run" / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == step
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", f"step_{step}.ckpt"}

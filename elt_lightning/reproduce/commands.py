"""The commands of `elt` that an experiment runs, each where its work is not done yet."""

import shlex
from pathlib import Path

from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import run_command
from elt_lightning.files import next_numbered
from elt_lightning.reproduce.sweeps import read_sweep


def elt(*arguments: object, dry_run: bool = False) -> None:
    """Show a command and, unless it is a dry run, run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ elt {shlex.join(words)}", flush=True)
    if not dry_run:
        run_command(words[0], words[1:])


def fit(settings: list[object], run_dir: Path, dry_run: bool = False) -> Path:
    """Train in a folder, going on where a checkpoint is; return the last one."""
    checkpoint = last_checkpoint(run_dir)
    going_on = ["--ckpt_path", checkpoint] if checkpoint.exists() else []
    elt("fit", *settings, "--run_dir", run_dir, *going_on, dry_run=dry_run)
    return checkpoint


def last_checkpoint(run_dir: Path) -> Path:
    """Return where a run's last checkpoint is."""
    return run_dir / "checkpoints" / "last.ckpt"


def is_measured(test_dir: Path, checkpoint: Path) -> bool:
    """Return whether a sweep is of a checkpoint as it is now; one of an earlier step is moved out of the way.

    Raises:
        UserError: sweep or checkpoint cannot be read.
    """
    if not (test_dir / "loops.json").is_file():
        return False
    measured = read_sweep(test_dir / "loops.json")["train_steps"]
    trained = read_checkpoint(checkpoint, prefixes=())["global_step"]
    if measured != trained:
        earlier = test_dir.rename(next_numbered(test_dir.parent, "earlier_test"))
        print(f"{earlier} has what was measured after {measured:,} steps; the checkpoint is of {trained:,} now")
    return bool(measured == trained)

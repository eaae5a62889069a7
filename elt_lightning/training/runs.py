"""A run's folder: which it is, that one command at a time works in it, and that all parts of a run use it."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.files import claim_numbered, next_numbered

logger = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=Callback)

RESULTS = ("checkpoints/last.ckpt", "loops.json", "reconstruction.json", "samples.npz", "samples")
"""What a run leaves in its folder: a folder without any of these may be used again, as after a kill."""

LOCK = ".lock"
"""The file in a run's folder that the process at work there has locked; it holds that process's name."""


def choose_run_dir(config: Namespace, subcommand: str) -> Path:
    """Choose the folder of a run, so that nothing that is there is overwritten.

    ``--run_dir`` decides. Otherwise a fit from a checkpoint of a run goes on in that run's folder, and any other
    command on such a checkpoint works in ``RUN/<command>_<n>``. What is left, fresh fits and checkpoints that lie
    outside of runs, works in ``runs/<name>_<n>`` by the name of the config, or else of the checkpoint.

    Raises:
        UserError: the folder asked for already holds another run.
    """
    run_of_checkpoint = run_of(config.ckpt_path) if config.get("ckpt_path") else None
    is_first = is_first_process()
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        # Of several processes the first decides; the others meet its config here.
        taken = is_first and any(os.path.lexists(run_dir / result) for result in RESULTS)
        if taken and (run_of_checkpoint is None or run_dir.resolve() != run_of_checkpoint):
            raise UserError(f"--run_dir {run_dir} already holds a run: choose another folder, or remove it")
        return run_dir
    # Of several processes the first makes the folder; the others take it over broadcasts.
    choose = claim_numbered if is_first else next_numbered
    if run_of_checkpoint is None:
        configs = [str(path) for path in config.get("config") or []]
        return choose("runs", Path(configs[-1]).stem if configs else subcommand)
    run_of_checkpoint = Path(os.path.relpath(run_of_checkpoint))
    return run_of_checkpoint if subcommand == "fit" else choose(run_of_checkpoint, subcommand)


def is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, by its variables as they are now.

    There is no trainer yet, and Lightning's own ``rank_zero_only`` read them when it was imported.
    """
    return (_get_rank() or 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


def run_of(checkpoint: str | Path) -> Path | None:
    """Return the folder RUN of a checkpoint in ``RUN/checkpoints``; None where that is no run's, which has a config."""
    folder = Path(checkpoint).resolve().parent
    is_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
    return folder.parent if is_run else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made; however this one ends, the lock ends with it.

    Of several devices the first process has the lock, for all. Loader processes do not inherit it.

    Raises:
        UserError: another process is at work there.
    """
    if not is_first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read(300).strip()}: wait for it, or choose another --run_dir"
            ) from error
        except OSError as error:
            logger.warning("%s has no locks (%s): let no other process work there", folder, error.strerror)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def run_folder(trainer: Trainer) -> Path:
    """Return the run's folder, the first rank's on all of them; Lightning's ``log_dir`` is wherever a logger writes."""
    return Path(trainer.strategy.broadcast(trainer.default_root_dir))


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """List a trainer's callbacks of one kind; Lightning gives the attribute no type."""
    return [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, kind)]


def log_picture(trainer: Trainer, name: str, picture: Tensor) -> None:
    """Show a picture (height, width) or (height, width, 3) uint8 in every logger that takes pictures."""
    for target in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(target, TensorBoardLogger):
            layout = "HW" if picture.ndim == 2 else "HWC"
            target.experiment.add_image(name, picture, trainer.global_step, dataformats=layout)
        elif isinstance(target, WandbLogger):
            target.log_image(name, [picture.cpu().numpy()], trainer.global_step)

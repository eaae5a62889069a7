"""When checkpoints are written, and how: whole or not at all."""

import math
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.training.runs import callbacks_of, run_folder
from elt_lightning.training.trainer_settings import check_monitored, monitored

UNFINISHED = ".unfinished.ckpt"
"""The file beside its place that a checkpoint is written into; the next one replaces what a killed run left."""


class WholeFiles(TorchCheckpointIO):
    """Write checkpoints that take their names once they are completely on disk.

    Lightning 2.6.6 makes a second copy of it in memory and a third in the folder for temporary files, which it then
    moves: where that folder is on another disk, that is a copy under the final name, of which a kill leaves half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: the disk is full, or cannot be written to. What had the name before is as it was.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(UNFINISHED)
        try:
            with open(aside, "wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            aside.unlink(missing_ok=True)


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # PyTorch then reports its position in the file instead
            raise error.__context__ from None
        raise


def name_again(path: Path, name: Path) -> None:
    """Link a second name in its folder to a file or folder; it is whole at any moment.

    It is a symbolic link. Some file systems have none: there it is a hard link, or a copy.
    """
    if name.exists() and name.samefile(path):
        return
    aside = name.with_name(f"{name.name}.new")
    remove(aside)
    for make in (os.symlink, os.link, shutil.copytree if path.is_dir() else shutil.copyfile):
        try:
            make(path.name if make is os.symlink else path, aside)
            break
        except OSError:
            remove(aside)
            if make not in (os.symlink, os.link):
                raise
    if name.is_dir() and not name.is_symlink():
        remove(name)  # no folder is replaced in one step
    os.replace(aside, name)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Checkpoint(ModelCheckpoint):
    """Lightning's checkpoints, with the settings of this project and one for the last step of training.

    Lightning saves after validation or every so many steps, and so loses what was trained after the last of these when
    the number of steps is not a multiple.

    Args:
        every_n_train_steps: optimiser steps from one save to the next; by default saves follow validations.
        train_time_interval: save at this interval, as HH:MM:SS.
        save_top_k: how many to keep: the newest, or the best in ``monitor``; −1 for all.
        monitor: a logged value, for example ``val/valid_squares@L4``.
        mode: whether a small ("min") or a large ("max") value is good.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_top_k: int = 1,
        monitor: str | None = None,
        mode: str = "min",
    ) -> None:
        super().__init__(
            filename="step_{step}",
            auto_insert_metric_name=False,
            # Without a monitored value the newest file is also the last: a link saves writing it twice.
            save_last="link" if monitor is None else True,
            # A resumed run goes on writing last.ckpt; Lightning would begin a last-v1.ckpt beside the old one.
            enable_version_counter=False,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            save_top_k=save_top_k,
            monitor=monitor,
            mode=mode,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write into the run's folder, wherever loggers write; and let the trainer write its files whole."""
        self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = WholeFiles()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and complain before other callbacks look in vain for what training logs (UserError: it did not)."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            candidates = self._monitor_candidates(trainer)
            for name in monitored(trainer):
                if name.startswith("train/") and name not in candidates:
                    self._save_and_complain(trainer, name, candidates)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; before training look whether what callbacks monitor is there (UserError: it is not)."""
        if trainer.sanity_checking:
            check_monitored(trainer)
        super().on_validation_end(trainer, pl_module)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save what is good by the monitored value; where there is none, the last step all the same.

        Raises:
            UserError: the monitored value was not logged.
        """
        if self.monitor is not None and self.monitor not in monitor_candidates:
            self._save_and_complain(trainer, self.monitor, monitor_candidates)
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_and_complain(self, trainer: Trainer, name: str, candidates: dict[str, Tensor]) -> NoReturn:
        self._save_last_checkpoint(trainer, candidates)
        raise UserError(
            f"nothing was logged as {name}, which is to be monitored: there are {', '.join(sorted(candidates))}; "
            f"step {trainer.global_step} is saved, go on with --ckpt_path {self.last_model_path}"
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct what the trainer takes as done; print how much of ``max_time``, which counts over all runs, is over.

        Raises:
            UserError: the checkpoint's progress is damaged.
        """
        if trainer.state.fn == "fit":
            try:
                correct_progress(checkpoint["loops"]["fit_loop"], trainer.accumulate_grad_batches)
            except (KeyError, TypeError) as error:
                raise UserError(f"the checkpoint's count of steps and epochs is damaged: {error}") from error
            if callbacks_of(trainer, Timer) and trainer.is_global_zero:
                done = checkpoint["callbacks"].get("Timer", {}).get("time_elapsed", {}).get("train", 0)
                print(
                    f"--trainer.max_time counts the time before the checkpoint too: {done:.0f} s are over", flush=True
                )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Point last.ckpt to the new file before the old one goes: killed at any moment, last.ckpt is whole."""
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link":
            self._link_checkpoint(trainer, filepath, os.path.join(os.path.dirname(filepath), "last.ckpt"))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Replace the link in one step; Lightning removes the old one first."""
        if trainer.is_global_zero:
            name_again(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if it is not saved yet."""
        if trainer.global_step != self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


def correct_progress(fit_loop: dict[str, Any], accumulation: int) -> None:
    """Correct a trainer's saved progress, in place, in two respects.

    Where a training ended by steps or time inside an epoch, Lightning 2.6.6 counts that epoch as done before it saves,
    and then once more when it is done. And it counts micro-batches: if their size has changed, their number is made to
    match the steps, which have ``accumulation`` of them from now on.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if not batches["is_last_batch"] and epochs["current"]["processed"] == epochs["current"]["started"] > 0:
        for count in (epochs["total"], epochs["current"]):
            count["processed"] -= 1
            count["completed"] = count["processed"]
    steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if math.ceil(batches["total"]["processed"] / max(1, steps["total"]["completed"])) != accumulation:
        for kind in ("total", "current"):
            before, now = batches[kind]["processed"], steps[kind]["completed"] * accumulation
            batches[kind] = {name: now - (before - count) for name, count in batches[kind].items()}

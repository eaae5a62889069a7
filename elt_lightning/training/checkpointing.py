"""When checkpoints are written, and how: whole or not at all."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

UNFINISHED = ".unfinished.ckpt"
"""The file beside its place that a checkpoint is written into; the next one replaces what a killed run left."""


class WholeFiles(TorchCheckpointIO):
    """Gives a checkpoint its name when all of it is on the disk.

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
        if isinstance(error.__context__, OSError):  # PyTorch then complains of its own place in the file
            raise error.__context__ from None
        raise


class Checkpoint(ModelCheckpoint):
    """Lightning's checkpoints, with the settings of this project and one for the last step of training.

    Lightning saves after validation or every so many steps, and so loses what was trained after the last of these when
    the number of steps is not a multiple.

    Args:
        every_n_train_steps: save every so many optimiser steps; by default after every validation.
        train_time_interval: save after every so much time, as HH:MM:SS.
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
        """Let the trainer write its files whole."""
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = WholeFiles()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Point last.ckpt to the new file before the old one goes: killed at any moment, last.ckpt is whole."""
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link":
            self._link_checkpoint(trainer, filepath, os.path.join(os.path.dirname(filepath), "last.ckpt"))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Replace the link in one step; Lightning removes the old one first."""
        if trainer.is_global_zero:
            aside = f"{linkpath}.new"
            if os.path.lexists(aside):
                os.remove(aside)
            os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), aside)
            os.replace(aside, linkpath)
        trainer.strategy.barrier()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if it is not saved yet."""
        if trainer.global_step != self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

"""When checkpoints are written."""

import os
from datetime import timedelta

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


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

"""When checkpoints are written."""

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
            save_last="link",
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            save_top_k=save_top_k,
            monitor=monitor,
            mode=mode,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if it is not saved yet."""
        if trainer.global_step != self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

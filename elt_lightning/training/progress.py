"""Progress of training: a bar on a terminal, a line now and then in logs and pipes."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only


class TerminalProgress(RichProgressBar):
    """Lightning's bar over the batches of an epoch, with the optimiser steps of the whole training beside it."""

    def _get_train_description(self, current_epoch: int) -> str:
        total = int(self.trainer.estimated_stepping_batches)
        return f"epoch {current_epoch}, from step {self.trainer.global_step} of {total}"


class PlainProgress(Callback):
    """Print a line about training every few seconds: step, loss, speed, time left.

    Args:
        every_seconds: at least this long between two lines.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        self.every_seconds = every_seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._first_step, self._start = trainer.global_step, time.perf_counter()
        self._last = self._start

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print when it is time."""
        now, total = time.perf_counter(), int(trainer.estimated_stepping_batches)
        step = trainer.global_step
        if (now - self._last < self.every_seconds and step < total) or step == self._first_step:
            return
        self._last = now
        speed = (step - self._first_step) / (now - self._start)
        left = (total - step) / speed
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        print(f"step {step}/{total}  loss {loss:.3f}  {speed:.1f} steps/s  {left:.0f} s left", flush=True)

"""SIGTERM, which clusters send some time before they take a machine away: what was trained is saved first."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

STATUS = 128 + signal.SIGTERM
"""The exit status of a program that SIGTERM ended, as shells and schedulers count it: 143."""


class Preemption(Callback):
    """On SIGTERM finish the optimiser step, save a checkpoint and end with status 143; outside of training just end.

    Lightning 2.6.6 ends as well, but with status 0 and without saving, and its handler talks to the other devices in
    the middle of whatever they do. Here the handler only takes a note. After each step all devices ask one another
    whether any has one, so that it is enough when one of them gets the signal; a single device asks nobody.

    A validation is broken off after any of its batches where there is one device. Sampling for metrics is not, nor is a
    validation by several devices: a signal in it takes effect after the step that follows.

    It must come after the callbacks whose work of a step belongs into the checkpoint, such as the average.
    """

    def __init__(self) -> None:
        self._is_asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over from Lightning, which puts back the handler before its own when it ends."""
        self._is_asked = trainer.received_sigterm
        handle_sigterm(self._take_note)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end_at_once_unless_training(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end_at_once_unless_training(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end_at_once_unless_training(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end, if that was asked; never between micro-batches, whose gradients no checkpoint holds."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.strategy.reduce_boolean_decision(
            self._is_asked, all=False
        ):
            save_and_end(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and end, if that was asked; devices may have different numbers of batches, so several do not ask."""
        if self._is_asked and trainer.world_size == 1:
            save_and_end(trainer, pl_module)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def _end_at_once_unless_training(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit":
            handle_sigterm(_end)


def handle_sigterm(handler: Any) -> None:
    """Set the handler where Python allows it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def save_and_end(trainer: Trainer, pl_module: LightningModule) -> NoReturn:
    """Write the checkpoint of the last step, unless it is written already, and leave.

    Raises:
        SIGTERMException: always; it leaves the program with status 143.
    """
    for callback in trainer.checkpoint_callbacks:
        callback.on_train_end(trainer, pl_module)
    if trainer.is_global_zero:
        path = getattr(trainer.checkpoint_callback, "last_model_path", "")
        where = f"is saved, go on with --ckpt_path {path}" if path else "is not saved"
        print(f"elt: ended by SIGTERM: step {trainer.global_step} {where}", file=sys.stderr, flush=True)
    raise SIGTERMException(STATUS)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SIGTERMException(STATUS)

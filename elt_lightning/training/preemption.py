"""SIGTERM and Ctrl-C in a training: what was trained is saved."""

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from elt_lightning.signals import ENDS, end, end_at_once_next_time, handle_signals, say
from elt_lightning.training.runs import callbacks_of
from elt_lightning.training.sharding import release_weights


class Preemption(Callback):
    """On SIGTERM or Ctrl-C finish the optimiser step, save a checkpoint and end; outside of training just end.

    The status is 143 or 130, as shells and schedulers count signals. A second Ctrl-C ends at once, without saving.

    Lightning 2.6.6 ends as well, but with status 0 or 1 and without saving, and its handler of SIGTERM talks to the
    other devices in the middle of whatever they do. Here the handler only takes a note. After each step all devices ask
    one another whether any has one, so that it is enough when one of them gets the signal; a single device asks nobody.

    A validation is broken off after any batch of samples that are drawn for metrics, and where there is one device
    after any of the held-out batches.

    It must come after the callbacks whose work belongs in a step's checkpoint, such as the average.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which puts back the handlers before its own when it ends."""
        self.asked = signal.SIGTERM if trainer.received_sigterm else None
        handle_signals(self._take_note)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of training, let a signal end the program at once."""
        if trainer.state.fn != "fit":
            handle_signals(end)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end, if that was asked; never between micro-batches, whose gradients no checkpoint holds."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            end_if_asked(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save and end, if that was asked; devices may have different numbers of batches, so several do not ask."""
        if trainer.world_size == 1:
            end_if_asked(trainer, pl_module)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        end_at_once_next_time()
        if self.asked == signal.SIGINT:
            say("elt: Ctrl-C: the step is finished and saved first; once more ends at once, without saving")


def end_if_asked(trainer: Trainer, pl_module: LightningModule) -> None:
    """End a training after saving its last step, if any device was asked to; all devices have to ask.

    Raises:
        SIGTERMException: it leaves the program with the status of the signal.
    """
    callbacks = callbacks_of(trainer, Preemption)
    if trainer.state.fn != "fit" or not callbacks:
        return
    asked = callbacks[0].asked
    if trainer.strategy.reduce_boolean_decision(asked is not None, all=False):
        save_and_end(trainer, pl_module, asked or signal.SIGTERM)


def save_and_end(trainer: Trainer, pl_module: LightningModule, number: signal.Signals) -> NoReturn:
    """Write the checkpoint of the last step, unless it is written already, and leave.

    Raises:
        SIGTERMException: always; it leaves the program with the status of the signal.
    """
    release_weights(pl_module)  # validation gathered them
    for callback in trainer.checkpoint_callbacks:
        callback.on_train_end(trainer, pl_module)
    if trainer.is_global_zero:
        path = saved_checkpoint(trainer)
        where = f"is saved, go on with --ckpt_path {path}" if path else "is not saved"
        print(f"elt: ended by {ENDS[number]}: step {trainer.global_step} {where}", file=sys.stderr, flush=True)
    raise SIGTERMException(128 + number)


def saved_checkpoint(trainer: Trainer) -> str | None:
    """Return the path of the checkpoint that holds the step that training is at, None if there is none."""
    callback: Any = trainer.checkpoint_callback
    if getattr(callback, "_last_global_step_saved", None) != trainer.global_step:
        return None
    return callback.last_model_path or None

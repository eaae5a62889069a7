"""What is shown while the trainer works: how far it is, and the scores of each validation."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from elt_lightning.training.meter import Meter
from elt_lightning.training.runs import callbacks_of


class Progress(Callback):
    """Show the progress of training, in optimiser steps of the whole, and of the held-out batches."""

    def __init__(self) -> None:
        self._meters: list[Meter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        total = int(trainer.estimated_stepping_batches)
        self._begin(meter(trainer, total, "step", done=trainer.global_step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step, with its loss when it is time for it: reading that means waiting for the device."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step, showing = trainer.global_step, self._meters[-1]
            showing.show(
                step,
                lambda: f"loss {float(outputs['loss']) * trainer.accumulate_grad_batches:.3f}",
                always=step == showing.total,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._begin(meter(trainer, batches(trainer.num_val_batches), "held-out batch"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._begin(meter(trainer, batches(trainer.num_test_batches), "held-out batch"))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batch."""
        self._meters[-1].show(batch_idx + 1)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end()

    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the meters, which hand the terminal back."""
        while self._meters:
            self._end()

    def _begin(self, meter: Meter) -> None:
        self._meters.append(meter.__enter__())

    def _end(self) -> None:
        self._meters.pop().__exit__(None, None, None)


class ValidationScores(Callback):
    """Print what a validation measured, a line for each loop count."""

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print everything logged as ``val/<name>`` or ``val/<name>@L<loops>``."""
        if trainer.sanity_checking:
            return
        scores: dict[str, list[str]] = {}
        for name, value in trainer.callback_metrics.items():
            name, _, place = name.partition("@")
            if name.startswith("val/"):
                scores.setdefault(place, []).append(f"{name.removeprefix('val/')} {value:.4g}")
        when = f"validation at step {trainer.global_step}" if trainer.state.fn == "fit" else "validation"
        for place, values in scores.items():
            print(when, *filter(None, [place]), *values, sep="  ", flush=True)


def batches(numbers: list[int | float]) -> int | None:
    """Return the number of batches over all loaders, None if one does not know."""
    total = sum(numbers)
    return None if total == float("inf") else int(total)


def meter(trainer: Trainer, total: int | None, unit: str, done: int = 0) -> Meter:
    """Return a meter that shows something if the trainer is to show progress."""
    return Meter(total, unit, done, bool(callbacks_of(trainer, Progress)))

"""Settings of Lightning's trainer that this program makes itself, or that do not go with what it does."""

from typing import Any

from lightning import Callback, Trainer

from elt_lightning.errors import UserError
from elt_lightning.training.runs import callbacks_of

INSTEAD: dict[str, tuple[Any, str]] = {
    "accumulate_grad_batches": (1, "it follows from --data.init_args.batch_size and --data.init_args.micro_batch_size"),
    "default_root_dir": (None, "a run's folder is --run_dir"),
    "overfit_batches": (0.0, "every step draws new samples; for few of them, train on a set that has no more"),
    "use_distributed_sampler": (False, "the data modules share samples out over devices"),
    "barebones": (False, "`elt bench` measures speed"),
    "enable_checkpointing": (None, "a training keeps its last step; to try one, --trainer.fast_dev_run=true"),
}
"""Settings that training accepts no other value of, and what to do instead."""

CALLBACKS_INSTEAD = {
    "LearningRateFinder": "--model.optimizer.init_args.lr",
    "BatchSizeFinder": "--data.init_args.micro_batch_size, by what `elt plan` says of memory",
    "GradientAccumulationScheduler": "--data.init_args.micro_batch_size",
    "StochasticWeightAveraging": "--ema.decay",
    "WeightAveraging": "--ema.decay",
    "EMAWeightAveraging": "--ema.decay",
}
"""Lightning's callbacks that change what this program sets, and the setting to use."""


def check_trainer_settings(settings: Any) -> None:
    """Check the ``trainer`` section of a training's config.

    Raises:
        UserError: a setting would be overwritten, or does not work here; what to use instead.
    """
    for name, (value, instead) in INSTEAD.items():
        if settings[name] not in (value, True if name == "enable_checkpointing" else value):
            raise UserError(f"--trainer.{name} cannot be set: {instead}")
    callbacks = settings.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = getattr(callback, "class_path", "").rpartition(".")[2]
        if name in CALLBACKS_INSTEAD:
            raise UserError(f"the callback {name} does not work here: set {CALLBACKS_INSTEAD[name]}")
    if settings.val_check_interval == 0:
        raise UserError("val_check_interval must be above 0; to train without validation, limit_val_batches is 0")


def count_in_steps(trainer: Trainer, accumulation: int) -> None:
    """Let a trainer accumulate micro-batches, and count in optimiser steps what Lightning counts in micro-batches.

    These are ``val_check_interval`` and ``limit_train_batches``, where they are whole numbers.
    """
    trainer.accumulate_grad_batches = accumulation
    for name in ("val_check_interval", "limit_train_batches"):
        value = getattr(trainer, name, None)  # there is no val_check_interval where validation goes by time
        if type(value) is int:
            setattr(trainer, name, value * accumulation)


def watch_monitored(trainer: Trainer) -> None:
    """Let a trainer validate one batch first, where a callback waits for a value that validation logs.

    Raises:
        UserError: there is no validation.
    """
    for name in monitored(trainer):
        if not name.startswith("train/"):
            if name.startswith("val/") and trainer.limit_val_batches == 0:
                raise UserError(f"{name} cannot be monitored: without validation (limit_val_batches 0) it is not there")
            trainer.num_sanity_val_steps = max(1, trainer.num_sanity_val_steps)


def monitored(trainer: Trainer) -> list[str]:
    """List the logged values that callbacks wait for."""
    names = [getattr(callback, "monitor", None) for callback in callbacks_of(trainer, Callback)]
    return [name for name in names if name]


def check_monitored(trainer: Trainer) -> None:
    """Check after a validation that what callbacks wait for was logged, as far as validation logs it.

    Raises:
        UserError: a name is not among what was logged.
    """
    logged = trainer.callback_metrics
    for name in monitored(trainer):
        if name not in logged and not name.startswith("train/"):
            raise UserError(f"nothing is logged as {name}, to be monitored: there are {', '.join(sorted(logged))}")

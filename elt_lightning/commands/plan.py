"""`elt plan`: what a config will need, before anything is started: parameters, memory, disk, steps, GPU-hours."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from elt_lightning.commands.arguments import Parser, number_from
from elt_lightning.commands.plan_data import Data, look_at_data
from elt_lightning.commands.plan_report import show
from elt_lightning.commands.refusals import explain
from elt_lightning.commands.train import (
    ELTCommandLine,
    long_flags,
    quieten_libraries,
    with_bases,
    with_stored_config,
)
from elt_lightning.data.base import GenerativeDataModule
from elt_lightning.errors import UserError
from elt_lightning.files import written_aside
from elt_lightning.planning import Settings, make_plan
from elt_lightning.training.module import ELTModule

WIDTH = 120
"""Columns of what is printed where there is no terminal."""


def run(name: str, arguments: list[str]) -> None:
    """Print the plan that the command line asks for.

    Raises:
        UserError: the command line, a config or a setting is wrong.
    """
    quieten_libraries()
    options, settings = build_parser().parse_known_args(arguments)
    if options.json is not None and options.json.exists() and not options.overwrite:
        raise UserError(f"{options.json} exists: choose another --json, or add --overwrite")
    config, data, module = read(settings, options.num_samples)
    try:
        plan = make_plan(module, settings_of(config, module, data, options))
    except ValueError as error:
        raise UserError(explain(str(error))) from error
    if options.json is not None:
        with written_aside(options.json) as aside:
            aside.write_text(json.dumps(data.as_dict() | plan.as_dict(), indent=1) + "\n")
    show(plan, data, Console(width=None if Console().is_terminal else WIDTH))


def build_parser() -> argparse.ArgumentParser:
    """Describe the flags that `elt fit` does not have; all others are those of `elt fit`."""
    parser = Parser(
        prog="elt plan",
        description=__doc__,
        epilog="All further flags are those of elt fit, --config PATH first of all.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--devices", type=number_from(1), metavar="N", help="over all nodes; by default the config's, 1 for auto"
    )
    parser.add_argument(
        "--tflops",
        type=positive(),
        default=989.0,
        help="assumed peak of a device in 10^12 operations per second (default 989: H100 or H200, dense bfloat16)",
    )
    parser.add_argument(
        "--utilisation", type=positive(1.0), default=0.4, help="assumed share of the peak, up to 1 (default 0.4)"
    )
    parser.add_argument(
        "--num_samples", type=number_from(1), metavar="N", help="training samples; by default what the data say"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file too")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def positive(largest: float = math.inf) -> Callable[[str], float]:
    """Make a type of arguments that are finite numbers above 0, up to ``largest``."""
    limit = "" if math.isinf(largest) else f" up to {largest:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= largest or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0{limit}")
        return value

    return parse


class PlanCommandLine(ELTCommandLine):
    """Reads and checks the settings of `elt fit`, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Settle no run folder."""

    def instantiate_classes(self) -> None:
        """Build neither data, model nor trainer."""

    def after_instantiate_classes(self) -> None:
        """Write no config."""

    def _set_seed(self) -> None:
        """Draw nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""

    def model_with(self, data: GenerativeDataModule) -> dict[str, Any]:
        """Give the ``model`` section as plain data, with what the data say filled in."""
        self.datamodule = data
        return self.recipe()[0]


def read(arguments: list[str], num_samples: int | None = None) -> tuple[dict[str, Any], Data, ELTModule]:
    """Read a config as `elt fit` would.

    Args:
        arguments: of `elt fit`.
        num_samples: how many there are to train on, as the user says; None asks the data.

    Returns:
        the resolved config, what is known of the data, and the module on the ``meta`` device.

    Raises:
        UserError: a config or a setting is wrong, or data are missing whose shape is not known without them.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = with_bases(long_flags("fit", arguments), Path(scratch))
            arguments = with_stored_config(arguments, Path(scratch))
            if not any(argument.partition("=")[0] == "--config" for argument in arguments):
                raise UserError("elt plan needs a config: --config PATH")
            command_line = cast(PlanCommandLine, PlanCommandLine.for_arguments(["fit", *arguments]))
        config = command_line.resolved_config()
        data = look_at_data(config, num_samples)
        return config, data, build_on_meta(command_line.model_with(data.module))
    except (ArgumentError, ValueError) as error:
        raise UserError(explain(str(error))) from error


def build_on_meta(model: dict[str, Any]) -> ELTModule:
    """Build a module without memory for its weights."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ELTModule, "model")
    with torch.device("meta"):
        module: ELTModule = parser.instantiate(parser.parse_object({"model": model})).model
    return module


def settings_of(config: dict[str, Any], module: ELTModule, data: Data, options: argparse.Namespace) -> Settings:
    """Gather what the plan depends on beside the model.

    Raises:
        UserError: how long to train is not said, or the batch does not split.
    """
    trainer, measured = config["trainer"], config["loop_metrics"]
    devices = options.devices or num_devices(trainer)
    micro_batch_size, _ = data.module.share_batch(devices)
    batch_size = data.module.batch_size
    if data.num_samples is not None and data.num_samples < batch_size:
        raise UserError(f"{data.num_samples} training samples are fewer than batch_size {batch_size}")
    steps, steps_said = num_steps(trainer, data.num_samples, batch_size)
    steps_per_epoch = None if data.num_samples is None else data.num_samples // batch_size
    num_validations = count_validations(trainer, steps, steps_per_epoch)
    return Settings(
        precision=trainer["precision"],
        devices=devices,
        micro_batch_size=micro_batch_size,
        batch_size=batch_size,
        steps=steps,
        steps_said=steps_said,
        num_validations=num_validations,
        num_validation_samples=measured["num_validation_samples"],
        num_held_out=data.num_held_out,
        num_test_samples=measured["num_samples"] * measured["repeats"] * len(measured["carry_state"] or [None]),
        loops=sorted(set(measured["loops"] or range(1, module.max_loops + 1))),
        guidance=measured["guidance"],
        num_checkpoints=num_checkpoints(config["checkpoint"], steps, num_validations),
        tflops=options.tflops,
        utilisation=options.utilisation,
    )


def num_devices(trainer: dict[str, Any]) -> int:
    """Count the devices that the config names, over all nodes; those it leaves open count as one."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        devices = len(devices)
    named = int(devices) if str(devices).isdecimal() else 1
    return max(1, named) * trainer["num_nodes"]


def num_steps(trainer: dict[str, Any], num_samples: int | None, batch_size: int) -> tuple[int, str]:
    """Count the optimiser steps, and say where they come from: ``max_steps`` or ``max_epochs``, whichever ends first.

    Args:
        trainer: the section of the config.
        num_samples: to train on, None if not known.
        batch_size: global batch; what does not fill one is left out of an epoch.

    Raises:
        UserError: neither is set, or how many samples an epoch has is not known.
    """
    limits, epochs = [], trainer["max_epochs"]
    if trainer["max_steps"] >= 0:
        limits.append((trainer["max_steps"], "max_steps"))
    if epochs not in (None, -1):
        if num_samples is None:
            raise UserError("how long an epoch is, these data do not say beforehand: add --num_samples N")
        per_epoch = num_samples // batch_size
        said = f"{epochs:,} epochs × ⌊{num_samples:,} / {batch_size:,}⌋ = {epochs:,} × {per_epoch:,}"
        limits.append((epochs * per_epoch, said))
    if not limits:
        raise UserError("say how long to train: --trainer.max_steps N or --trainer.max_epochs N")
    return min(limits)


def count_validations(trainer: dict[str, Any], steps: int, steps_per_epoch: int | None) -> int:
    """Count how often training validates; intervals in hours, and epochs of unknown length, count as never.

    Args:
        trainer: the section of the config; its ``val_check_interval`` is in optimiser steps, or a share of an epoch.
        steps: optimiser steps.
        steps_per_epoch: whole batches of an epoch, None if not known.
    """
    interval, every = trainer["val_check_interval"], trainer["check_val_every_n_epoch"]
    interval = 1.0 if interval is None else interval
    if trainer["limit_val_batches"] == 0 or not isinstance(interval, int | float):
        return 0
    if every is None:
        return steps // max(1, int(interval))
    if steps_per_epoch is None:
        return 0
    step = interval if isinstance(interval, int) else max(1, int(interval * steps_per_epoch))
    return steps // steps_per_epoch // every * (steps_per_epoch // step)


def num_checkpoints(checkpoint: dict[str, Any], steps: int, num_validations: int) -> int:
    """Count the checkpoints that are kept at the end."""
    if checkpoint["save_top_k"] >= 0:
        return checkpoint["save_top_k"] + (checkpoint["monitor"] is not None)
    every = checkpoint["every_n_train_steps"]
    return max(1, steps // every if every else num_validations)

"""`elt plan`: what a config will need, before anything is started: parameters, memory, disk, steps, GPU-hours."""

import argparse
import json
import math
import pydoc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from elt_lightning.commands.arguments import Parser, number_from
from elt_lightning.commands.train import (
    ELTCommandLine,
    explain,
    find_section,
    long_flags,
    quieten_libraries,
    with_bases,
    with_stored_config,
)
from elt_lightning.data.base import GenerativeDataModule
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.data.tensors import TensorDataModule
from elt_lightning.errors import UserError
from elt_lightning.files import written_aside
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.module import ELTModule
from elt_lightning.planning import BACKWARD, FLOPS_PER_MAC, Codes, Plan, Precision, Settings, make_plan
from elt_lightning.tokenizers.base import Tokenizer

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


def read(arguments: list[str], num_samples: int | None = None) -> tuple[dict[str, Any], "Data", ELTModule]:
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


class AssumedImageNet(GenerativeDataModule):
    """Stands in for ImageNet-1k at 256×256 pixels, encoded, where it is not there yet; it has no samples.

    Args:
        has_tokens: 16×16 tokens of MaskGIT's 1024 codes, or Stable Diffusion's latents 4×32×32.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
    """

    NUM_SAMPLES, NUM_HELD_OUT = 1_281_167, 50_000

    num_classes = 1000

    def __init__(self, has_tokens: bool, batch_size: int, micro_batch_size: int | None) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers=0, seed=0)
        self.input_shape = (16, 16) if has_tokens else (4, 32, 32)
        self.num_codes = 1024 if has_tokens else None
        # Of latents, `elt encode` keeps the moments: means and standard deviations.
        self.codes = Codes((16 * 16,), is_tokens=True) if has_tokens else Codes((2 * 4, 32, 32), is_tokens=False)

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        raise NotImplementedError

    def build_metrics(self) -> list[SampleMetric]:  # noqa: D102
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """What is known of the data.

    Attributes:
        module: says the shape of a sample and the number of classes.
        num_samples: to train on; None where that is known only once they are there.
        num_held_out: whose losses validation measures, 0 where that is not known.
        codes: what is kept of a picture on disk, None for data that are not encoded beforehand.
        assumed: why ImageNet-1k is assumed, None where the data themselves were asked.
    """

    module: GenerativeDataModule
    num_samples: int | None
    num_held_out: int = 0
    codes: Codes | None = None
    assumed: str | None = None

    def disk(self) -> dict[str, int]:
        """Bytes of the encoded sets, by what they are; nothing where nothing is encoded."""
        if self.codes is None or self.num_samples is None:
            return {}
        return {
            "training_codes": self.num_samples * self.codes.num_bytes,
            "training_shards": self.num_samples * self.codes.bytes_in_shard(copies=1),
            "training_shards_mirrored": self.num_samples * self.codes.bytes_in_shard(copies=2),
            "held_out_shards": self.num_held_out * self.codes.bytes_in_shard(copies=1),
        }

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {
            "data": {
                "num_classes": self.module.num_classes,
                "input_shape": list(self.module.input_shape),
                "num_codes": self.module.num_codes,
                "num_samples": self.num_samples,
                "num_held_out": self.num_held_out,
                "assumed": self.assumed,
            },
            "disk": self.disk(),
        }


def look_at_data(config: dict[str, Any], num_samples: int | None) -> Data:
    """Ask the data module of a config, or assume ImageNet-1k where its shards are not there yet.

    Args:
        config: resolved.
        num_samples: how many there are to train on, as the user says; None asks the data.

    Raises:
        UserError: other data are missing, or settings are wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=GenerativeDataModule)
    section = config["data"]
    try:
        module = parser.instantiate(parser.parse_object({"data": section})).data
    except UserError as error:
        if not issubclass(pydoc.locate(section["class_path"]), ImageNetDataModule):  # type: ignore[arg-type]
            raise
        has_tokens = find_section(config, "model.network.init_args.num_codes")[0] is not None
        sizes = {name: section["init_args"][name] for name in ("batch_size", "micro_batch_size")}
        assumed = AssumedImageNet(has_tokens, **sizes)
        num_samples = num_samples or assumed.NUM_SAMPLES
        return Data(assumed, num_samples, assumed.NUM_HELD_OUT, assumed.codes, assumed=str(error))
    if isinstance(module, ImageNetDataModule):
        index, held_out = module.training_index, module.held_out_index.num_samples
        codes = Codes(index.stored_shape, index.num_codes is not None)
        return Data(module, num_samples or index.num_samples, held_out, codes)
    if isinstance(module, TensorDataModule):
        return Data(module, num_samples or len(module.training_set()), len(module.held_out_set()))
    return Data(module, num_samples or getattr(module, "num_train", None), getattr(module, "num_held_out", 0))


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
        num_test_samples=measured["num_samples"] * measured["repeats"],
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


def show(plan: Plan, data: Data, console: Console) -> None:
    """Print a plan, with the arithmetic that leads to each figure."""
    sections = {
        "Data": data_section(data),
        "Parameters": parameter_section(plan),
        "Multiply–accumulates (MAC) of one sample": macs_section(plan),
        "Steps": steps_section(plan),
        "Memory of one device in training": memory_section(plan),
        "Disk": disk_section(plan, data),
        "GPU-hours of training": training_section(plan),
        "GPU-hours of elt test": sweep_section(plan),
    }
    for title, parts in sections.items():
        console.print(f"\n{title}", style="bold", highlight=False)
        for part in parts:
            part = Text(part) if isinstance(part, str) else part  # a path may look like rich's markup
            console.print(Padding(part, (0, 0, 0, 2), expand=False), highlight=False)


def data_section(data: Data) -> list[RenderableType]:
    """Say what the data are, and whether they were asked."""
    module = data.module
    shape = "×".join(map(str, module.input_shape))
    what = f"latents {shape}" if module.num_codes is None else f"{shape} tokens of {module.num_codes:,} codes"
    count = "an unknown number of" if data.num_samples is None else f"{data.num_samples:,}"
    held_out = f", {data.num_held_out:,} held out" if data.num_held_out else ""
    line = f"{count} training samples{held_out}; {module.num_classes:,} classes; {what}"
    return [line] if data.assumed is None else [f"assumed, as ImageNet-1k: {line}", f"because {data.assumed}"]


def parameter_section(plan: Plan) -> list[RenderableType]:
    """Count the parameters."""
    backbone, network = scaled(plan.parameters_backbone), scaled(plan.parameters)
    return [aligned(("shared backbone", backbone), ("whole network", network))]


def macs_section(plan: Plan) -> list[RenderableType]:
    """Say what a pass, a sample and a training image cost."""
    table = with_columns("loops", "one pass", "drawing a sample")
    for loops, macs in plan.forward_macs.items():
        table.add_row(str(loops), scaled(macs), scaled(plan.sample_macs[loops]))
    return [
        table,
        f"drawing takes {plan.passes_per_sample:,} passes: {plan.sampling_steps:,} steps, guidance "
        f"{plan.guidance_scale:g}",
        f"a training image takes {scaled(plan.image_macs.total)}, as worked out below",
    ]


def steps_section(plan: Plan) -> list[RenderableType]:
    """Say how many optimiser steps there are, and how one is shared out."""
    settings = plan.settings
    passes = settings.batch_size // settings.devices // settings.micro_batch_size
    return [
        f"{settings.steps_said} = {settings.steps:,} optimiser steps",
        f"samples of a step: {settings.batch_size:,} = {settings.devices:,} × {passes:,} × "
        f"{settings.micro_batch_size:,} (devices × passes of each × samples of a pass)",
    ]


def memory_section(plan: Plan) -> list[RenderableType]:
    """Lay out what a device holds, with and without ``checkpoint_loops``."""
    settings, kept = plan.settings, plan.activations
    autocast = Precision.named(settings.precision).autocast
    copies = f"weights copied to {str(autocast).removeprefix('torch.')} by autocast"
    samples = f"{settings.micro_batch_size:,} samples ×"
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "gradient_buckets": "gradients again, to exchange them between devices (DDP)",
        "optimizer_state": "the optimiser's state",
        "average": "averaged weights, which lie on the same device",
        "weight_copies": copies if autocast else "what does not grow with the samples",
        "loops": f"activations of a loop: {samples} {bytes_of(kept.loop.per_sample)}, {plan.max_loops} or 1 held",
        "states": f"states between loops: {samples} {bytes_of(kept.states.per_sample)}",
        "ends": f"embedding, heads, losses: {samples} {bytes_of(kept.ends.per_sample)}",
    }
    here = {recompute: " (this config)" * (recompute == plan.checkpoint_loops) for recompute in plan.memory}
    table = with_columns("", f"all kept{here[False]}", f"checkpoint_loops{here[True]}")
    for name, meaning in names.items():
        amounts = [getattr(memory, name) for memory in plan.memory.values()]
        if any(amounts):
            table.add_row(meaning, *(bytes_of(amount) for amount in amounts))
    table.add_row("total", *(bytes_of(memory.total) for memory in plan.memory.values()), style="bold")
    return [
        table,
        "Activations are what autograd keeps when this network and loss run on tensors without contents. On top come",
        "what an operation needs for a moment, the CUDA context, gaps between allocations: see train/peak_memory_gib.",
    ]


def disk_section(plan: Plan, data: Data) -> list[RenderableType]:
    """Say what encoded sets and checkpoints take."""
    disk = data.disk()
    names = {
        "training_codes": "codes of the training pictures alone",
        "training_shards": "in shards of elt encode",
        "training_shards_mirrored": "in shards with --mirrored",
        "held_out_shards": "shards of the held-out pictures",
    }
    rows = [(names[name], scaled(amount, "B")) for name, amount in disk.items()]
    rows.append(("a checkpoint: weights, optimiser's state, averaged weights", scaled(plan.checkpoint_bytes, "B")))
    kept = plan.settings.num_checkpoints
    total = scaled((kept + 1) * plan.checkpoint_bytes, "B")
    return [aligned(*rows, (f"checkpoints: {kept:,} kept, and room to write the next", total))]


def training_section(plan: Plan) -> list[RenderableType]:
    """Work out the hours of training, line by line."""
    settings, image = plan.settings, plan.image_macs
    hours = plan.training.gpu_hours(settings.flops_per_second)
    forward = image.forward + image.students
    rows = [
        (f"one pass, L = {plan.max_loops}", scaled(image.forward, "MAC")),
        ("+ heads of students", scaled(image.students, "MAC")),
        ("× 3, as backward takes twice forward", scaled((1 + BACKWARD) * forward, "MAC")),
        ("+ loops computed again, where checkpoint_loops is set", scaled(image.recomputed, "MAC")),
        ("× 2 operations in a MAC: one image", scaled(FLOPS_PER_MAC * image.total, "FLOP")),
        (
            f"× {plan.training.count:,} images = {settings.steps:,} steps × {settings.batch_size:,}",
            scaled(plan.training.flops, "FLOP"),
        ),
        (f"/ {speed(settings)}", in_hours(hours)),
    ]
    if settings.devices > 1:
        rows.append((f"/ {settings.devices:,} devices", in_hours(hours / settings.devices, "hours on the clock")))
    if plan.validation.count:
        held_out = f" and {settings.num_held_out:,} held-out losses" if settings.num_held_out else ""
        work = f"{settings.num_validation_samples:,} samples{held_out} at each loop count"
        rows.append(
            (
                f"beside it, validation: {plan.validation.count:,} times {work}",
                in_hours(plan.validation.gpu_hours(settings.flops_per_second)),
            )
        )
    return [
        aligned(*rows),
        "Peak and utilisation are assumptions, by default 0.4 of the 989 TFLOP/s of an H100 or H200 in dense bfloat16:",
        "replace them by your own measurement with --tflops and --utilisation. "
        f"This config computes in {settings.precision or '32-true'}.",
    ]


def sweep_section(plan: Plan) -> list[RenderableType]:
    """Work out the hours of a sweep over loop counts."""
    settings = plan.settings
    table = with_columns("loops", "one sample", f"× {settings.num_test_samples:,}", f"/ {speed(settings)}")
    for loops, work in plan.test.items():
        hours = work.gpu_hours(settings.flops_per_second)
        table.add_row(
            str(loops), scaled(FLOPS_PER_MAC * work.macs, "FLOP"), scaled(work.flops, "FLOP"), in_hours(hours)
        )
    hours = sum(work.gpu_hours(settings.flops_per_second) for work in plan.test.values())
    table.add_row("all", "", "", in_hours(hours), style="bold")
    scales = f" A sample stands for one at each guidance scale of {settings.guidance}." if settings.guidance else ""
    return [table, f"Without the tokenizer's decoder and the metrics' networks, the same at every loop count.{scales}"]


def speed(settings: Settings) -> str:
    """Write out the speed that is reckoned with."""
    return f"({settings.tflops:g} TFLOP/s × {settings.utilisation:g})"


def aligned(*rows: tuple[str, str]) -> Table:
    """Lay out names and their amounts."""
    table = Table.grid(padding=(0, 3))
    table.add_column()
    table.add_column(justify="right")
    for name, amount in rows:
        table.add_row(name, amount)
    return table


def with_columns(first: str, *others: str) -> Table:
    """Begin a table whose columns after the first hold amounts."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def scaled(amount: float, unit: str = "") -> str:
    """Write an amount with three digits and a decimal prefix: 26.9 GMAC."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    while abs(amount) >= 999.5 and len(prefixes) > 1:
        amount, prefixes = amount / 1000, prefixes[1:]
    digits = f"{amount:#.3g}".rstrip(".") if amount else "0"
    return f"{digits} {prefixes[0]}{unit}".rstrip()


def in_hours(amount: float, unit: str = "GPU-hours") -> str:
    """Write hours with three digits."""
    return f"{amount:,.0f} {unit}" if amount >= 99.5 else f"{amount:#.3g} {unit}"


def bytes_of(amount: int) -> str:
    """Write bytes of memory in the unit that suits them, as devices' memory is counted."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if amount >= size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount:,} B" if amount else "–"

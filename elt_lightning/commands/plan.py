"""`elt plan`: what a config will need, before anything is started: parameters, memory, disk, steps, GPU-hours."""

import argparse
import io
import math
import pydoc
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elt_lightning.checkpoints.pretrained import empty_module, read_recipe
from elt_lightning.commands.arguments import ABOVE_0, Parser, file_path, number, whole
from elt_lightning.commands.planning import Settings, make_plan
from elt_lightning.commands.refusals import explain
from elt_lightning.commands.settings import find_section, prepared
from elt_lightning.commands.train import ELTCommandLine, quieten_libraries, teach
from elt_lightning.data.base import GenerativeDataModule
from elt_lightning.data.crops import Picture
from elt_lightning.data.encode import ShardWriter
from elt_lightning.data.encoded import EncodedDataModule
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.data.published import imagenet_moments, imagenet_tokens, ucf101_tokens
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.tensors import TensorDataModule
from elt_lightning.data.video_tokens import UCF101TokensDataModule
from elt_lightning.errors import UserError
from elt_lightning.evaluation.loop_metrics import loops_to_measure
from elt_lightning.files import write_json
from elt_lightning.samplers.base import SETTINGS
from elt_lightning.training.module import ELTModule

WIDTH = 120
"""Columns of what is printed where there is no terminal."""


def run(name: str, arguments: list[str]) -> None:
    """Print the plan that the command line asks for (UserError: the command line, a config or a setting is wrong)."""
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
        write_json(options.json, data.as_dict() | {"disk": data.disk()} | plan)
    table = Table.grid(padding=(0, 3))
    for title, lines in groupby(report(plan, data, module), key=itemgetter(0)):
        # a path may look like markup
        table.add_row(Text(title, style="bold"), Text("\n".join(line for _, line in lines)))
    Console(width=None if Console().is_terminal else WIDTH).print(table, highlight=False)


def build_parser() -> argparse.ArgumentParser:
    """Describe the flags that `elt fit` does not have; all others are those of `elt fit`."""
    epilog = "All further flags are those of elt fit, --config PATH first of all."
    parser = Parser(prog="elt plan", description=__doc__, epilog=epilog, allow_abbrev=False)
    add, count = parser.add_argument, whole(1)
    add("--devices", type=count, metavar="N", help="over all nodes; by default the config's, 1 for auto")
    add("--device_memory", type=ABOVE_0, default=79.0, help="GiB of a device (default 79: an H100 of 80 GB)")
    tera = "assumed peak of a device in 10^12 operations per second (default 989: H100 or H200, dense bfloat16)"
    add("--tflops", type=ABOVE_0, default=989.0, help=tera)
    share = "assumed share of the peak, up to 1 (default 0.4)"
    add("--utilisation", type=number("number above 0 up to 1", lambda value: 0 < value <= 1), default=0.4, help=share)
    add("--num_samples", type=count, metavar="N", help="training samples; by default what the data say")
    add("--json", type=file_path, metavar="PATH", help="write all numbers to this file too")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


class PlanCommandLine(ELTCommandLine):
    """Reads and checks the settings of `elt fit`, and builds nothing."""

    def _do_nothing(self, *_: Any, **__: Any) -> None:
        """Settle no run folder, build neither data nor model nor trainer, write no config, train nothing."""

    before_instantiate_classes = instantiate_classes = after_instantiate_classes = _do_nothing
    _set_seed = _run_subcommand = _do_nothing


class Data(NamedTuple):
    """What is known of the data."""

    module: GenerativeDataModule  # says the shape of a sample and the number of classes
    num_samples: int | None  # to train on; None where that is known only once the data are there
    num_val: int  # held-out samples whose losses validation measures, 0 where that is not known
    assumed: str | None = None  # what data set is assumed, and why; None where the data themselves were asked

    def disk(self) -> dict[str, int]:
        """Return the bytes of the encoded sets, by what they are; nothing where nothing is encoded."""
        if self.num_samples is None or not isinstance(self.module, EncodedDataModule):
            return {}
        index = self.module.training_index
        return {
            "training_codes": self.num_samples * 2 * math.prod(index.stored_shape),
            "training_shards": self.num_samples * bytes_in_shard(index, copies=1),
            "training_shards_mirrored": self.num_samples * bytes_in_shard(index, copies=2),
            "val_shards": self.num_val * bytes_in_shard(index, copies=1),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return this as plain data."""
        said = {name: getattr(self.module, name) for name in ("num_classes", "input_shape", "codebook_size")}
        return {"data": said | {name: value for name, value in self._asdict().items() if name != "module"}}


def bytes_in_shard(index: ShardIndex, copies: int) -> int:
    """Return the bytes of a picture's two members in a tar, written as `elt encode` writes them."""
    codes = np.zeros((copies, *index.stored_shape), np.float16 if index.codebook_size is None else np.int16)
    with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.USTAR_FORMAT) as tar:
        ShardWriter(tar).add(Picture("n01440764/n01440764_10026.JPEG", path=""), codes)
        return tar.offset


def read(arguments: list[str], num_samples: int | None = None) -> tuple[dict[str, Any], Data, ELTModule]:
    """Read a config as `elt fit` would, whose ``arguments`` these are.

    Returns:
        the resolved config, what is known of the data, and the module on the ``meta`` device.

    Raises:
        UserError: a config or a setting is wrong, or data are missing whose shape is not known without them.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = prepared("fit", arguments, Path(scratch))
            if not any(argument.partition("=")[0] == "--config" for argument in arguments):
                raise UserError("elt plan needs a config: --config PATH")
            command_line = cast(PlanCommandLine, PlanCommandLine.for_arguments(["fit", *arguments]))
        config = command_line.resolved_config()
        data = look_at_data(config, num_samples)
        command_line.datamodule = data.module
        with torch.device("meta"):  # no memory for weights
            module: ELTModule = build(ELTModule, command_line.recipe()[0])
            if module.outer_teacher is not None:
                teach(module, module.outer_teacher.path, lambda path: empty_module(read_recipe(path)["model"]))
    except (ArgumentError, ValueError) as error:
        raise UserError(explain(str(error))) from error
    return config, data, module


def build(kind: type, section: dict[str, Any]) -> Any:
    """Build what a section of a config describes: the settings of ``kind``, or a subclass of it and its settings."""
    parser = ArgumentParser(exit_on_error=False)
    if "class_path" in section:
        parser.add_argument("--built", type=kind)
    else:
        parser.add_class_arguments(kind, "built")
    return parser.instantiate(parser.parse_object({"built": section})).built


def look_at_data(config: dict[str, Any], num_samples: int | None) -> Data:
    """Ask the data module of a config, or assume the published set where its shards are not there yet.

    ``num_samples`` to train on, where the user says so, wins over what the data say.

    Raises:
        UserError: other data are missing, or settings are wrong.
    """
    section, assumed = config["data"], None
    describe: Callable[[int], ShardIndex]
    counts: tuple[int | None, int]
    try:
        module = build(GenerativeDataModule, section)
    except UserError as error:
        kind: Any = pydoc.locate(section["class_path"])
        has_tokens = find_section(config, "model.network.init_args.codebook_size")[0] is not None
        if issubclass(kind, ImageNetDataModule):
            name, sizes = "ImageNet-1k", (1_281_167, 50_000)
            describe = imagenet_tokens if has_tokens else imagenet_moments
        elif issubclass(kind, UCF101TokensDataModule):
            name, sizes, describe = "UCF-101, split 1", (9537, 3783), ucf101_tokens
        else:
            raise
        assumed = f"{name}, because {error}"
        with tempfile.TemporaryDirectory() as training, tempfile.TemporaryDirectory() as val:
            for folder, size in zip((training, val), sizes, strict=True):
                describe(size).write(folder)
            places = {"training_shards": training, "val_shards": val}
            module = build(GenerativeDataModule, section | {"init_args": section["init_args"] | places})
    if isinstance(module, EncodedDataModule):
        counts = module.training_index.num_samples, module.val_index.num_samples
    elif isinstance(module, TensorDataModule):
        counts = len(module.training_set()), len(module.val_set())
    else:
        counts = getattr(module, "num_train", None), getattr(module, "num_val", 0)
    return Data(module, num_samples or counts[0], counts[1], assumed)


def settings_of(config: dict[str, Any], module: ELTModule, data: Data, options: argparse.Namespace) -> Settings:
    """Gather what the plan depends on beside the model.

    Raises:
        UserError: the length of training is not set, or the batch does not split.
    """
    trainer, measured, checkpoint = config["trainer"], config["loop_metrics"], config["checkpoint"]
    listed = trainer["devices"]
    named = len(listed) if isinstance(listed, list) else int(listed) if str(listed).isdecimal() else 1
    devices = options.devices or max(1, named) * trainer["num_nodes"]
    batch_size, per_epoch = data.module.batch_size, None
    if data.num_samples is not None:
        per_epoch = data.num_samples // batch_size
        if per_epoch < 1:
            raise UserError(
                f"{data.num_samples} training samples are fewer than batch_size {batch_size}: "
                f"--data.init_args.batch_size={data.num_samples} or less"
            )
    steps = num_steps(trainer, per_epoch)
    num_validations = count_validations(trainer, steps, per_epoch)
    if checkpoint["save_top_k"] >= 0:
        num_checkpoints = checkpoint["save_top_k"] + (checkpoint["monitor"] is not None)
    else:
        every = checkpoint["every_n_train_steps"]
        num_checkpoints = max(1, steps // every if every else num_validations)
    return Settings(
        precision=trainer["precision"],
        devices=devices,
        micro_batch_size=data.module.share_batch(devices)[0],
        batch_size=batch_size,
        steps=steps,
        num_validations=num_validations,
        num_validation_samples=measured["num_validation_samples"],
        num_val=data.num_val,
        num_test_samples=measured["num_samples"] * measured["repeats"],
        loops=loops_to_measure(measured["loops"], module.max_loops),
        swept={name: measured[name] for name in SETTINGS},
        num_checkpoints=num_checkpoints,
        tflops=options.tflops,
        utilisation=options.utilisation,
        device_memory=options.device_memory,
    )


def num_steps(trainer: dict[str, Any], steps_per_epoch: int | None) -> int:
    """Count the optimiser steps until ``max_steps`` or ``max_epochs`` of the trainer, whichever ends first.

    Raises:
        UserError: neither is set, or how many whole batches an epoch has is not known (None).
    """
    limits, epochs = [trainer["max_steps"]] if trainer["max_steps"] >= 0 else [], trainer["max_epochs"]
    if epochs not in (None, -1):
        if steps_per_epoch is None:
            raise UserError("how long an epoch is, these data do not say beforehand: add --num_samples N")
        limits.append(epochs * steps_per_epoch)
    if not limits:
        raise UserError("say how long to train: --trainer.max_steps N or --trainer.max_epochs N")
    return min(limits)


def count_validations(trainer: dict[str, Any], steps: int, steps_per_epoch: int | None) -> int:
    """Count how often training validates; intervals in hours, and epochs of unknown length, count as never.

    ``val_check_interval`` of the ``trainer`` section is in optimiser steps, or a share of an epoch.
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


def report(plan: dict[str, Any], data: Data, module: ELTModule) -> Iterator[tuple[str, str]]:
    """Write what a plan says as lines below titles, each figure with the arithmetic that leads to it."""
    settings, sampler, datamodule = SimpleNamespace(**plan["settings"]), module.sampler, data.module
    shape, codes = "×".join(map(str, datamodule.input_shape)), datamodule.codebook_size
    what = f"latents {shape}" if codes is None else f"{shape} tokens of {codes:,} codes"
    count = "an unknown number of" if data.num_samples is None else f"{data.num_samples:,}"
    val = f", {data.num_val:,} held out" if data.num_val else ""
    if data.assumed:
        yield "data", f"assumed, as {data.assumed}"
    yield "data", f"{count} training samples{val}; {datamodule.num_classes:,} classes; {what}"
    backbone, whole = in_units(plan["parameters_backbone"]), in_units(plan["parameters"])
    yield "parameters", f"{backbone} in the shared backbone, {whole} in all"
    at_most = "" if sampler.loop_schedule.tolerance is None else "at most "
    for loops, macs in plan["forward_macs"].items():
        drawn = plan["sample_macs"].get(loops)
        drawing = f", drawing a sample {at_most}{in_units(drawn)}" if drawn else ": too few to draw, by its weak exit"
        yield "MACs", f"L = {loops}: a pass {in_units(macs)}{drawing}"
    calls = f"{at_most}{len(sampler.network_calls(module.max_loops)):,} passes"
    yield "MACs", f"a sample takes {calls}: {sampler.steps:,} steps, guidance {sampler.guidance.scale:g}"
    each, samples = settings.micro_batch_size, settings.devices * settings.micro_batch_size
    split = f"{settings.devices:,} × {settings.batch_size // samples:,} × {each:,} samples"
    split += " (devices × passes of each × samples of a pass)"
    yield "steps", f"{settings.steps:,} optimiser steps of {settings.batch_size:,} = {split}"

    recomputes = module.network.backbone.activation_checkpointing
    for name, is_config, key, kept in (
        ("all kept", not recomputes, "", plan["kept"]["per_sample"]),
        ("activation_checkpointing", recomputes, "_recomputing", plan["kept"]["recomputing"]),
    ):
        total, largest = in_gib(plan[f"memory{key}"]), plan[f"largest_batch{key}"]
        of_which = f"of which {each:,} samples × {kept / 2**20:,.2f} MiB"
        holds = f"{settings.device_memory:g} GiB hold {largest:,} samples of a pass"
        yield "memory", f"{name}{' (this config)' * is_config}: {total}, {of_which}; {holds}"
    resident = ", ".join(f"{name} {in_gib(size)}" for name, size in plan["resident"].items() if size)
    yield "memory", f"whatever the batch: {resident}"
    yield (
        "memory",
        "on top come what an operation needs for a moment, the CUDA context, gaps: see train/peak_memory_gib",
    )
    if disk := {name: in_units(amount, "B") for name, amount in data.disk().items()}:
        shards = f"{disk['training_shards']} in shards, {disk['training_shards_mirrored']} with --mirrored"
        yield "disk", f"{disk['training_codes']} of codes; {shards}; held-out shards {disk['val_shards']}"
    one, kept = plan["checkpoint_bytes"], settings.num_checkpoints
    room = in_units((kept + 1) * one, "B")
    yield "disk", f"a checkpoint {in_units(one, 'B')}; {kept:,} kept, and room to write the next: {room}"

    macs, images, hours = plan["image_macs"], settings.steps * settings.batch_size, plan["training_hours"]
    passes = f"forward at L = {module.max_loops} with the students' heads, backward twice that"
    yield "training", f"an image {in_units(macs, 'MAC')}: {passes}{', and every loop computed again' * recomputes}"
    yield "training", f"× 2 operations × {images:,} images = {in_units(2 * macs * images, 'FLOP')}"
    speed = f"({settings.tflops:g} TFLOP/s × {settings.utilisation:g})"
    on_all = f"; on {settings.devices:,} devices {in_time(hours / settings.devices)}" if settings.devices > 1 else ""
    yield "training", f"/ {speed} = {in_time(hours, 'GPU-')}: peak and utilisation are assumptions{on_all}"
    validation = in_time(plan["validation_hours"], "GPU-")
    yield "training", f"beside it {settings.num_validations:,} validations: {validation}"
    test, several = plan["test_hours"], ", ".join(f"{name} {each}" for name, each in settings.swept.items() if each)
    several = several and f" at each {several}"
    swept = f"{settings.num_test_samples:,} samples{several} at L = {', '.join(map(str, test))}"
    sums = f"{' + '.join(in_time(each, 'GPU-') for each in test.values())} = {in_time(sum(test.values()), 'GPU-')}"
    yield "elt test", f"{swept}: {sums}, without the tokenizer and the metrics' networks"


def in_units(amount: float, unit: str = "") -> str:
    """Write an amount with three digits and a decimal prefix: 26.9 GMAC."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    while abs(amount) >= 999.5 and len(prefixes) > 1:
        amount, prefixes = amount / 1000, prefixes[1:]
    digits = f"{amount:#.3g}".rstrip(".") if amount else "0"
    return f"{digits} {prefixes[0]}{unit}".rstrip()


def in_time(hours: float, of: str = "") -> str:
    """Write a time, given in hours, with three digits: 119 GPU-hours, 0.113 GPU-seconds, ``of`` a "GPU-"."""
    amount, unit = next((hours * many, name) for many, name in TIMES if hours * many >= 1 or many == TIMES[-1][0])
    return f"{amount:,.0f} {of}{unit}" if amount >= 99.5 else f"{amount:#.3g}".rstrip(".") + f" {of}{unit}"


TIMES = ((1, "hours"), (60, "minutes"), (3600, "seconds"))


def in_gib(amount: int) -> str:
    """Write bytes of memory as devices' memory is counted."""
    return f"{amount / 2**30:,.2f} GiB" if amount >= 2**30 / 10 else f"{amount / 2**20:,.2f} MiB"

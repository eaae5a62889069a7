"""`elt bench`: how fast this machine is with this program, as ratios measured in one run."""

import argparse
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from elt_lightning.bench import inference, training
from elt_lightning.bench.data import SUBJECTS
from elt_lightning.bench.machine import describe_machine, device_name
from elt_lightning.bench.report import Lines, inference_lines, training_lines, write_figures
from elt_lightning.bench.runs import add_run, read_runs
from elt_lightning.bench.shapes import SHAPES, Shape
from elt_lightning.commands.arguments import (
    Parser,
    add_device_argument,
    between,
    choices_from,
    device_of,
    file_path,
    whole,
    wholes,
)
from elt_lightning.commands.train import quieten_libraries
from elt_lightning.errors import MOST, UserError
from elt_lightning.files import write_json
from elt_lightning.networks.looped import CompileMode
from elt_lightning.training.precision import PRECISIONS


def run(name: str, arguments: list[str]) -> None:
    """Measure what the command line asks for (UserError: the command line is wrong)."""
    options = build_parser().parse_args(arguments)
    options.command = shlex.join(["elt", name, *arguments])
    options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt bench", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="KIND", required=True, help="what is measured")
    data = kinds.add_parser("data", help="reading of shards, and decoding of videos and pictures", allow_abbrev=False)
    for counted, default, of_what in (
        ("images", 40_000, "encoded pictures, and clips, in an epoch of shards (default 40000, 1 GB; 0 for no shards)"),
        ("videos", 128, "videos that clips are cut out of (default 128, 60 MB; 0 for none, which needs no PyAV)"),
        ("jpegs", 512, "pictures that are decoded (default 512, 60 MB; 0 for none)"),
    ):
        data.add_argument(f"--num_{counted}", type=whole(0), default=default, help=of_what)
    data.add_argument(
        "--num_workers", type=whole(0, MOST["num_workers"]), default=os.cpu_count() or 1, help="loader processes"
    )
    data.add_argument("--batch_size", type=whole(1), help="samples per batch (default: those of the configs)")
    data.add_argument("--repeats", type=whole(1), default=5, help="epochs that are timed (default 5)")
    data.add_argument("--output", type=file_path, metavar="PATH", help="write the figures as JSON")
    data.set_defaults(run=bench_data)

    sampling = kinds.add_parser(
        "inference", help="samples per second, looped beside unlooped models of equal depth", allow_abbrev=False
    )
    add_common(sampling, "B, L, XL, H on a GPU, small on a CPU", "1,8,64 on a GPU, 1,8 on a CPU", "bf16-true")
    sampling.add_argument(
        "--loops", type=wholes(1), metavar="1,2,4", help="by default powers of two up to the size's loop count"
    )
    sampling.add_argument("--steps", type=whole(1), help="sampling steps (the paper's on a GPU, 2 on a CPU)")
    sampling.add_argument(
        "--guidance", type=between(0, 100), default=1.0, help="scale; other than 1 takes two branches"
    )
    sampling.set_defaults(run=bench_inference)

    train = kinds.add_parser(
        "train", help="training steps: ILSD, vanilla looping, unlooped models of equal depth", allow_abbrev=False
    )
    add_common(train, "wide on a GPU, small on a CPU", "8,32 on a GPU, 2,8 on a CPU", "bf16-mixed")
    train.add_argument("--loops", type=wholes(1), metavar="1,4", help="L_max (default: the size's)")
    train.add_argument("--num_layers", type=whole(1), help="N (default: the size's)")
    train.add_argument(
        "--activation_checkpointing",
        type=choices_from("no", "yes"),
        default=["no"],
        metavar="no,yes",
        help="compute each loop again in the backward pass (default no)",
    )
    train.add_argument("--recall", action="store_true", help="measure ILSD with recall, too")
    train.set_defaults(run=bench_train)

    report = kinds.add_parser("report", help="lay out the JSON files of a folder as figures.md", allow_abbrev=False)
    report.add_argument("--folder", type=Path, default=Path("benchmarks"), help="of the JSON files")
    report.set_defaults(run=lambda options: print(write_figures(options.folder)))
    return parser


def add_common(parser: argparse.ArgumentParser, scales: str, batch_sizes: str, precision: str) -> None:
    """Add what measuring networks has in common; the texts say what is left to the device."""
    add = parser.add_argument
    add("--scale", type=choices_from(*SHAPES), metavar="NAME,…", help=f"of {', '.join(SHAPES)} (default: {scales})")
    add("--batch_sizes", type=wholes(1), metavar="1,8", help=f"samples at once (default {batch_sizes})")
    add(
        "--compile",
        type=choices_from("no", *get_args(CompileMode)),
        default=["no"],
        metavar="no,default",
        help="without and with torch.compile, by its modes (default no)",
    )
    add("--precision", choices=PRECISIONS, metavar="NAME", help=f"({precision} on a GPU, 32-true on a CPU)")
    add("--rounds", type=whole(1), default=5, help="turns of every contender (default 5)")
    add("--turn_seconds", type=between(1e-4, 60), default=0.2, help="of a turn at least (default 0.2)")
    add_device_argument(parser)
    add("--output", type=file_path, metavar="PATH", help="add the figures to a JSON file")


def bench_inference(options: argparse.Namespace) -> None:
    """Measure sampling."""
    device = device_of(options.device)
    on_gpu = device.type == "cuda"

    def rows(name: str, shape: Shape) -> Iterator[dict[str, Any]]:
        settings = inference.Settings(
            loops=options.loops or sorted({loops for loops in (1, 2, 4, 8, shape.loops) if loops <= shape.loops}),
            batch_sizes=options.batch_sizes or ([1, 8, 64] if on_gpu else [1, 8]),
            precision=options.precision or ("bf16-true" if on_gpu else "32-true"),
            steps=options.steps or (shape.paper_steps if on_gpu else 2),
            guidance=options.guidance,
            **turns(options, device),
        )
        return inference.measure(name, shape, settings)

    measure_networks(options, device, options.scale or (["B", "L", "XL", "H"] if on_gpu else ["small"]), rows)


def bench_train(options: argparse.Namespace) -> None:
    """Measure training steps."""
    device = device_of(options.device)
    on_gpu = device.type == "cuda"

    def rows(name: str, shape: Shape) -> Iterator[dict[str, Any]]:
        settings = training.Settings(
            num_layers=options.num_layers or shape.num_layers,
            loops=options.loops or [shape.loops],
            batch_sizes=options.batch_sizes or ([8, 32] if on_gpu else [2, 8]),
            activation_checkpointing=[choice == "yes" for choice in options.activation_checkpointing],
            recall=options.recall,
            precision=options.precision or ("bf16-mixed" if on_gpu else "32-true"),
            **turns(options, device),
        )
        return training.measure(name, shape, settings)

    measure_networks(options, device, options.scale or (["wide"] if on_gpu else ["small"]), rows, training_lines)


def turns(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the settings that both kinds of measurements take as they are given."""
    return {name: getattr(options, name) for name in ("compile", "rounds", "turn_seconds")} | {"device": device}


def measure_networks(
    options: argparse.Namespace,
    device: torch.device,
    scales: list[str],
    rows_of: Callable[[str, Shape], Iterator[dict[str, Any]]],
    lay_out: Callable[[list[dict[str, Any]]], Lines] = inference_lines,
) -> None:
    """Measure sizes one after the other, print what came out, and write it where a file was asked for."""
    if options.output is not None:
        read_runs(options.output)  # a file that cannot be added to is found before, not after
    rows: list[dict[str, Any]] = []
    try:
        for name in scales:
            rows += rows_of(name, SHAPES[name])
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device ran out of memory at size {name}: lower --batch_sizes") from error
    lines = lay_out(rows)
    table = Table(title=f"{lines.title}: {device_name(device)}")
    for heading in lines.headings:
        table.add_column(heading, justify="right")
    for cells in lines.cells:
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 180).print(table)
    if options.output is not None:
        add_run(options.output, describe_machine(device, options.command) | {"rows": rows})
        print(options.output)


def bench_data(options: argparse.Namespace) -> None:
    """Measure reading of shards, and decoding of videos and pictures."""
    quieten_libraries()
    table = Table(title=f"reading with {options.num_workers} loader processes")
    headings = ("what is read", "unit", "batch", "per second", "slowest to fastest", "batches/s")
    for heading in (*headings, "one GPU takes", "GPUs fed", "hours for all"):
        table.add_column(heading, justify="right")
    readings = []
    for subject in SUBJECTS:
        num_samples = getattr(options, f"num_{subject.counted}")
        if not num_samples:
            continue
        row = subject.measure(num_samples, options.num_workers, options.batch_size, options.repeats)
        readings.append(row)
        speeds, needed = row[f"{subject.unit}_per_second"], row["needed_per_second"]
        table.add_row(
            subject.codes,
            subject.unit,
            str(row["batch_size"]),
            f"{row['median']:,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            f"{row['batches_per_second']:,.2f}",
            "" if needed is None else f"{needed:,.0f}, {needed / row['batch_size']:,.2f} batches",
            "" if needed is None else f"{row['ratio']:.1f}",
            f"{row['hours']:.2g}",
        )
    Console(width=None if Console().is_terminal else 150).print(table)
    print("one GPU: an H100 or H200 at half its published 989 TFLOP/s in bf16, training scale L or 8N×4L on pictures,")
    print("6N×4L on clips or, at the most, the 3D-VQ tokenizer; hours for all: the published training set, once")
    if options.output is not None:
        described = describe_machine(torch.device("cpu"), options.command)
        write_json(options.output, described | {"readings": readings}, indent=2)
        print(options.output)

"""`elt bench`: how fast this machine is with this program, as ratios measured in one run."""

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elt_lightning.bench.data import Reading, measure
from elt_lightning.bench.machine import describe_machine
from elt_lightning.commands.arguments import Parser, number_from
from elt_lightning.files import written_aside


def run(name: str, arguments: list[str]) -> None:
    """Measure what the command line asks for.

    Raises:
        UserError: the command line is wrong.
    """
    options = build_parser().parse_args(arguments)
    options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt bench", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="KIND", required=True, help="what is measured")
    data = kinds.add_parser("data", help="reading of encoded pictures", allow_abbrev=False)
    data.add_argument(
        "--num_images", type=number_from(8), default=40_000, help="pictures in an epoch (default 40000, 1 GB)"
    )
    data.add_argument("--num_workers", type=number_from(0), default=os.cpu_count() or 1, help="loader processes")
    data.add_argument("--batch_size", type=number_from(1), default=512, help="samples per batch (default 512)")
    data.add_argument("--repeats", type=number_from(1), default=5, help="epochs that are timed (default 5)")
    data.add_argument("--output", type=Path, metavar="PATH", help="write the figures as JSON")
    data.set_defaults(run=bench_data)
    return parser


def bench_data(options: argparse.Namespace) -> None:
    """Measure reading of tokens and of latents."""
    table = Table(title=f"reading shards with {options.num_workers} loader processes, batches of {options.batch_size}")
    for heading in ("codes", "images/s", "slowest to fastest", "one GPU takes", "GPUs fed"):
        table.add_column(heading, justify="right")
    readings: list[Reading] = []
    for reading in measure(options.num_images, options.num_workers, options.batch_size, options.repeats):
        readings.append(reading)
        speeds = reading.images_per_second
        table.add_row(
            reading.codes,
            f"{median(speeds):,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            f"{reading.needed_per_second:,.0f}",
            f"{reading.ratio:.1f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    print("one GPU: an H100 or H200 at half its published 989 TFLOP/s in bf16, training scale L or 8N×4L")
    write(options.output, {"readings": [reading.as_dict() for reading in readings]}, torch.device("cpu"))


def write(path: Path | None, figures: dict[str, Any], device: torch.device) -> None:
    """Write figures with what they were measured on, where a file was asked for."""
    if path is not None:
        with written_aside(path) as aside:
            aside.write_text(json.dumps(describe_machine(device) | figures, indent=2) + "\n")
        print(path)

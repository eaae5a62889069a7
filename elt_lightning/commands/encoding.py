"""What the kinds of `elt encode` share: flags, the run over this process's shards, finding a tokenizer."""

import argparse
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from elt_lightning.commands.arguments import SEEDS, add_machine_arguments, between, whole
from elt_lightning.data.crops import Crops
from elt_lightning.data.encode import Encoding, ShardFolder
from elt_lightning.data.shards import INDEX
from elt_lightning.errors import UserError, printable
from elt_lightning.training.meter import Meter


def add_shared_arguments(
    parser: argparse.ArgumentParser, thing: str, size: int, samples_per_shard: int, batch_size: int
) -> None:
    """Describe what every kind's command line has; ``thing`` is what one sample is called, the rest are defaults."""
    add = parser.add_argument
    add("--tokenizer_path", metavar="PATH", help="the tokenizer's file or folder")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the shards; goes on in it")
    add("--size", type=whole(1), default=size, help=f"side of the centre crop (default {size})")
    add("--mirrored", action="store_true", help=f"keep the codes of each {thing}'s mirror image too")
    add(
        "--shard",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="do the I-th of N equal shares, I from 0 (default 0/1)",
    )
    add("--samples_per_shard", type=whole(1), default=samples_per_shard, help=f"default {samples_per_shard}")
    add("--batch_size", type=whole(1), default=batch_size, help=f"{thing}s encoded at once (default {batch_size})")
    add_machine_arguments(parser)
    text = f"share of {thing}s that may be unreadable (default 0.01)"
    add("--max_unreadable", type=between(0, 1), default=0.01, help=text)
    add("--seed", type=whole(0, SEEDS), default=0, help="of the order of a folder's files (default 0)")


def encode_into_shards(encoding: Encoding, options: argparse.Namespace, device: torch.device) -> None:
    """Do this process's share of the shards, and write the index when all are done.

    Raises:
        UserError: the output folder holds something else, or too much cannot be read.
    """
    source = encoding.source
    folder = ShardFolder(options.output, encoding.settings())
    share_number, shares = options.shard
    mine = range(share_number, source.num_parts, shares)
    parts = [part for part in mine if folder.finished(part) is None]
    print(f"{options.output}: {source.num_parts} shards, {len(mine)} of them this process's, {len(parts)} still to do")
    crops = encoding.run(folder, parts, options.batch_size, options.num_workers, device, options.max_unreadable)
    counts = [source.count(part) for part in parts]
    total = None if None in counts else sum(count or 0 for count in counts)  # None where it would mean reading them
    with closing(crops):
        summary = watch(crops, total, encoding)
    index = encoding.write_index(folder, options.max_unreadable)
    if index is None:
        missing = sum(folder.finished(part) is None for part in range(source.num_parts))
        print(f"{summary}; {missing} of {source.num_parts} shards are missing: the other --shards make them")
    else:
        skipped = f", without {len(index.unreadable)} unreadable ones" if index.unreadable else ""
        print(
            f"{summary}; {options.output / INDEX} lists {index.num_samples} {encoding.thing}s{skipped}, "
            f"{len(index.classes)} classes, {len(index.shards)} shards"
        )


def watch(batches: Iterator[Crops], total: int | None, encoding: Encoding) -> str:
    """Show how the work goes, name what is unreadable, and report at the end what was done and how fast.

    Args:
        batches: what was encoded.
        total: of what is to do, None if unknown.
        encoding: names what is encoded.
    """
    done = num_unreadable = 0
    began = time.perf_counter()
    with Meter(total, encoding.thing) as meter:
        for crops in batches:
            for name, reason in crops.unreadable:
                print(
                    f"unreadable, skipped: {printable(name)} ({printable(' '.join(reason.split()))})",
                    file=sys.stderr,
                    flush=True,
                )
            done += crops.num_tried
            num_unreadable += len(crops.unreadable)
            meter.show(done)
    speed = done / (time.perf_counter() - began)
    encoded = f"{done - num_unreadable} {encoding.thing}s encoded now"
    return f"{encoded}, {num_unreadable} unreadable, {speed:.1f} {encoding.unit}"


def build_tokenizer(
    name: str, path: str | None, short_names: dict[str, str], suits: Callable[[type], bool], otherwise: str
) -> Any:
    """Build the tokenizer of a short name or a class path, with its file where one is given.

    Raises:
        UserError: there is no such class, it does not suit (``otherwise`` says what it is not), its file is missing or
            wrong, or it takes none.
    """
    module_name, _, class_name = short_names.get(name, name).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(short_names)
        why = f" ({error})" if module_name else ""
        raise UserError(
            f"--tokenizer {name} is neither one of {known} nor a class that can be imported{why}"
        ) from error
    if not (isinstance(kind, type) and suits(kind)):
        raise UserError(f"--tokenizer {name} is not {otherwise}")
    takes = inspect.signature(kind).parameters
    if path is None and "path" in takes and takes["path"].default is inspect.Parameter.empty:
        raise UserError(f"--tokenizer {name} needs its file: --tokenizer_path PATH")
    if path is not None and "path" not in takes:
        raise UserError(f"--tokenizer {name} takes no --tokenizer_path")
    try:
        return kind(**({} if path is None else {"path": path}))
    except TypeError as error:
        raise UserError(f"--tokenizer {name} with --tokenizer_path {path}: {error}") from error


def share(text: str) -> tuple[int, int]:
    """Parse a share of the work: I/N with 0 ≤ I < N."""
    number, _, shares = text.partition("/")
    if not (number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N − 1, such as 0/4")
    return int(number), int(shares)

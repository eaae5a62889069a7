"""`elt encode`: pictures or clips to shards of latents or tokens, once, so that training need not do it each time."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from elt_lightning.commands.arguments import SEEDS, Parser, device_of, number_from
from elt_lightning.data.crops import CROPS, Crops, default_workers
from elt_lightning.data.encode import Encoding, ShardFolder
from elt_lightning.data.encode_images import ImageEncoding
from elt_lightning.data.images import ImageSource, open_source
from elt_lightning.data.shards import INDEX, ShardIndex
from elt_lightning.errors import UserError, printable
from elt_lightning.meter import Meter
from elt_lightning.tokenizers.base import ImageTokenizer

TOKENIZERS = {
    "sd-vae": "elt_lightning.tokenizers.kl_vae.KLAutoencoder",
    "maskgit-vqgan": "elt_lightning.tokenizers.maskgit_vqgan.MaskGITVQGAN",
    "pixels": "elt_lightning.tokenizers.continuous.PixelScaling",
}


def run(name: str, arguments: list[str]) -> None:
    """Encode what the command line asks for.

    Raises:
        UserError: the command line, the pictures, their labels, the tokenizer or the output folder are wrong.
    """
    options = build_parser().parse_args(arguments)
    options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    from elt_lightning.commands import encode_ucf101  # which stands on what is below

    parser = Parser(prog="elt encode", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="KIND", required=True, help="what is encoded")
    for kind, orientation, what in (
        ("images", "upright", "pictures in class folders, in folders with a list of labels, or in tars"),
        ("imagenet", "stored", "the same by ImageNet's protocol: cameras' orientation tags are not followed"),
    ):
        add_image_arguments(kinds.add_parser(kind, help=what, allow_abbrev=False), orientation)
    encode_ucf101.add_arguments(
        kinds.add_parser("ucf101", help="clips of UCF-101, or laid out like it", allow_abbrev=False)
    )
    return parser


def add_image_arguments(parser: argparse.ArgumentParser, orientation: str) -> None:
    """Describe the command line of `elt encode images` and `imagenet`, which differ in the default orientation."""
    parser.set_defaults(run=encode_images)
    parser.add_argument(
        "--root",
        required=True,
        nargs="+",
        metavar="PATH",
        help="folder of pictures or of tars; or tars, 'x-{00..99}.tar', each of which stays one shard",
    )
    parser.add_argument(
        "--tokenizer", required=True, help=f"{', '.join(TOKENIZERS)}, or the class path of an ImageTokenizer"
    )
    parser.add_argument("--labels", metavar="FILE", help="the classes of a folder's pictures, where folders do not say")
    parser.add_argument(
        "--classes_from", metavar="DIR", help="take classes and their order from another encoded set (train, for val)"
    )
    parser.add_argument(
        "--orientation",
        choices=CROPS,
        default=orientation,
        help=f"upright, as cameras' tags say, or as pixels are stored (default {orientation})",
    )
    add_shared_arguments(parser, "picture", size=256, samples_per_shard=10_000, batch_size=64)


def add_shared_arguments(
    parser: argparse.ArgumentParser, thing: str, size: int, samples_per_shard: int, batch_size: int
) -> None:
    """Describe what every kind's command line has; ``thing`` is what one sample is called, the rest are defaults."""
    parser.add_argument("--tokenizer_path", metavar="PATH", help="the tokenizer's file or folder")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the shards; goes on in it")
    parser.add_argument("--size", type=number_from(1), default=size, help=f"side of the centre crop (default {size})")
    parser.add_argument("--mirrored", action="store_true", help=f"keep the codes of each {thing}'s mirror image too")
    parser.add_argument(
        "--shard",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="do the I-th of N equal shares, I from 0 (default 0/1)",
    )
    parser.add_argument(
        "--samples_per_shard",
        type=number_from(1),
        default=samples_per_shard,
        help=f"default {samples_per_shard}",
    )
    parser.add_argument(
        "--batch_size", type=number_from(1), default=batch_size, help=f"{thing}s encoded at once (default {batch_size})"
    )
    parser.add_argument(
        "--num_workers",
        type=number_from(0),
        default=default_workers(),
        help="decoding processes (default: one per core)",
    )
    parser.add_argument("--device", help="for example cuda:1; by default a GPU where there is one")
    parser.add_argument(
        "--max_unreadable", type=fraction, default=0.01, help=f"share of {thing}s that may be unreadable (default 0.01)"
    )
    parser.add_argument(
        "--seed", type=number_from(0, SEEDS), default=0, help="of the order of a folder's files (default 0)"
    )


def encode_images(options: argparse.Namespace) -> None:
    """Encode pictures.

    Raises:
        UserError: see :func:`run`.
    """
    if any(options.output.resolve().is_relative_to(Path(root).resolve()) for root in options.root):
        raise UserError(f"--output {options.output} lies in --root: choose a folder beside it")
    device = device_of(options.device)
    classes = read_classes(options.classes_from) if options.classes_from else None
    tokenizer = build_tokenizer(options.tokenizer, options.tokenizer_path).to(device).eval()
    source = open_source(options.root, options.labels, classes, options.samples_per_shard, options.seed)
    encoding = ImageEncoding(source, tokenizer, options.size, options.mirrored, CROPS[options.orientation])
    encode_into_shards(encoding, options, device)


def encode_into_shards(encoding: Encoding, options: argparse.Namespace, device: torch.device) -> None:
    """Do this process's share of the shards, and write the index when all are done.

    Raises:
        UserError: see :func:`run`.
    """
    source = encoding.source
    folder = ShardFolder(options.output, encoding.settings())
    share_number, shares = options.shard
    mine = range(share_number, source.num_parts, shares)
    parts = [part for part in mine if folder.finished(part) is None]
    print(f"{options.output}: {source.num_parts} shards, {len(mine)} of them this process's, {len(parts)} still to do")
    crops = encoding.run(folder, parts, options.batch_size, options.num_workers, device, options.max_unreadable)
    with closing(crops):
        summary = watch(crops, count_pictures(source, parts), encoding)
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


def count_pictures(source: ImageSource, parts: list[int]) -> int | None:
    """Count what is to do, None where that would mean reading it."""
    counts = [source.count(part) for part in parts]
    return None if None in counts else sum(count or 0 for count in counts)


def watch(batches: Iterator[Crops], total: int | None, encoding: Encoding) -> str:
    """Show how the work goes, name what is unreadable, and say at the end what was done and how fast.

    Args:
        batches: what was encoded.
        total: of what is to do, None if unknown.
        encoding: says what it is called.
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


def build_tokenizer(name: str, path: str | None) -> ImageTokenizer:
    """Build the tokenizer of pictures of a short name or a class path.

    Raises:
        UserError: there is no such tokenizer, its file is missing or wrong, or it takes none.
    """
    kind = find_class(name, TOKENIZERS)
    if not (isinstance(kind, type) and issubclass(kind, ImageTokenizer)):
        raise UserError(f"--tokenizer {name} is not an ImageTokenizer")
    tokenizer: ImageTokenizer = build(kind, name, path)
    return tokenizer


def find_class(name: str, short_names: dict[str, str]) -> Any:
    """Import what a short name or a class path means.

    Raises:
        UserError: there is no such thing.
    """
    module_name, _, class_name = short_names.get(name, name).rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(short_names)
        raise UserError(
            f"--tokenizer {name} is neither one of {known} nor a class that can be imported ({error})"
        ) from error


def build(kind: Any, name: str, path: str | None) -> Any:
    """Build a tokenizer, with its file where one is given.

    Raises:
        UserError: its file is missing or wrong, or it takes none.
    """
    try:
        return kind(**({} if path is None else {"path": path}))
    except TypeError as error:
        raise UserError(f"--tokenizer {name} with --tokenizer_path {path}: {error}") from error


def read_classes(location: str) -> tuple[str, ...]:
    """Read the classes of an encoded set, from its folder or its ``index.json``.

    Raises:
        UserError: there is no index.
    """
    folder = os.path.dirname(location) or "." if location.endswith(INDEX) else location
    return ShardIndex.read(folder).classes


def share(text: str) -> tuple[int, int]:
    """Parse a share of the work: I/N with 0 ≤ I < N."""
    number, _, shares = text.partition("/")
    if not (number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N − 1, such as 0/4")
    return int(number), int(shares)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value

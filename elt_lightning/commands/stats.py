"""`elt stats`: the Inception moments of a folder of images, which FID compares samples with."""

import argparse
from dataclasses import replace
from pathlib import Path

from elt_lightning.commands.arguments import Parser, add_machine_arguments, device_of, whole
from elt_lightning.data.crops import CROPS
from elt_lightning.data.images import batches
from elt_lightning.data.shards import ShardIndex
from elt_lightning.errors import UserError
from elt_lightning.metrics.inception import WEIGHTS_URL, FIDInception
from elt_lightning.metrics.reference import compute_moments, write_moments


def run(name: str, arguments: list[str]) -> None:
    """Compute the moments that the command line asks for, and write them.

    Raises:
        UserError: the command line, the images or the network's weights are wrong.
    """
    options = build_parser().parse_args(arguments)
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists: choose another --output, or add --overwrite")
    device = device_of(options.device)
    network = FIDInception.load(options.inception_path).to(device)
    size, crop = options.size, CROPS[options.orientation or "stored"]
    if options.like is not None:
        if options.orientation is not None:
            raise UserError("--orientation is what the shards of --like have: leave it out")
        index = ShardIndex.read(options.like)
        size, crop = index.image_size, index.crop
    images = batches(options.images, size, options.batch_size, options.num_workers, crop)
    moments = compute_moments(images, network)
    made_with = {"size": size, "crop": crop} | moments.made_with
    write_moments(options.output, replace(moments, made_with=made_with))
    print(f"{options.output}: {moments.num_images} images, {size}×{size}, {crop}")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt stats", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--images", required=True, metavar="PATH", help="folder of images or of tars, or one tar")
    add("--inception_path", required=True, metavar="PATH", help=f"weights, published at {WEIGHTS_URL}, or download")
    add("--output", required=True, type=Path, metavar="PATH", help="the .npz file to write")
    prepared = parser.add_mutually_exclusive_group(required=True)
    prepared.add_argument("--like", metavar="DIR", help="shards that a model is trained on: prepare images like them")
    prepared.add_argument("--size", type=whole(1), help="side of the centre crop, that of the samples")
    add(
        "--orientation",
        choices=CROPS,
        help="with --size: upright, as cameras' tags say, or as pixels are stored (default stored)",
    )
    add("--batch_size", type=whole(1), default=64, help="images read at once (default 64)")
    add_machine_arguments(parser)
    add("--overwrite", action="store_true", help="replace the file if it exists")
    return parser

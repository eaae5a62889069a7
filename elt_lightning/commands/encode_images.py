"""`elt encode images` and `imagenet`: pictures to shards of latents or tokens."""

import argparse
import os
from pathlib import Path

from elt_lightning.commands.arguments import device_of
from elt_lightning.commands.encoding import add_shared_arguments, build_tokenizer, encode_into_shards
from elt_lightning.data.crops import CROPS
from elt_lightning.data.encode_images import ImageEncoding
from elt_lightning.data.images import open_source
from elt_lightning.data.shards import INDEX, ShardIndex
from elt_lightning.errors import UserError
from elt_lightning.tokenizers.base import ImageTokenizer

TOKENIZERS = {
    "sd-vae": "elt_lightning.tokenizers.kl_vae.KLAutoencoder",
    "maskgit-vqgan": "elt_lightning.tokenizers.maskgit_vqgan.MaskGITVQGAN",
    "pixels": "elt_lightning.tokenizers.continuous.PixelScaling",
}


def add_arguments(parser: argparse.ArgumentParser, orientation: str) -> None:
    """Describe the command line of `elt encode images` and `imagenet`, which differ in the default orientation."""
    parser.set_defaults(run=encode_images)
    add = parser.add_argument
    add(
        "--root",
        required=True,
        nargs="+",
        metavar="PATH",
        help="folder of pictures or of tars; or tars, 'x-{00..99}.tar', each of which stays one shard",
    )
    add("--tokenizer", required=True, help=f"{', '.join(TOKENIZERS)}, or the class path of an ImageTokenizer")
    add("--labels", metavar="FILE", help="the classes of a folder's pictures, where folders do not say")
    add("--classes_from", metavar="DIR", help="take classes and their order from another encoded set (train, for val)")
    add(
        "--orientation",
        choices=CROPS,
        default=orientation,
        help=f"upright, as cameras' tags say, or as pixels are stored (default {orientation})",
    )
    add_shared_arguments(parser, "picture", size=256, samples_per_shard=10_000, batch_size=64)


def encode_images(options: argparse.Namespace) -> None:
    """Encode pictures.

    Raises:
        UserError: the command line, the pictures, their labels, the tokenizer or the output folder are wrong.
    """
    if any(options.output.resolve().is_relative_to(Path(root).resolve()) for root in options.root):
        raise UserError(f"--output {options.output} lies in --root: choose a folder beside it")
    device = device_of(options.device)
    classes = read_classes(options.classes_from) if options.classes_from else None
    tokenizer = build_image_tokenizer(options.tokenizer, options.tokenizer_path).to(device).eval()
    source = open_source(options.root, options.labels, classes, options.samples_per_shard, options.seed)
    encoding = ImageEncoding(source, tokenizer, options.size, options.mirrored, CROPS[options.orientation])
    encode_into_shards(encoding, options, device)


def build_image_tokenizer(name: str, path: str | None) -> ImageTokenizer:
    """Build the tokenizer of pictures of a short name or a class path; see :func:`build_tokenizer`."""
    return build_tokenizer(name, path, TOKENIZERS, lambda kind: issubclass(kind, ImageTokenizer), "an ImageTokenizer")


def read_classes(location: str) -> tuple[str, ...]:
    """Read the classes of an encoded set, from its folder or its ``index.json`` (UserError: there is no index)."""
    folder = os.path.dirname(location) or "." if location.endswith(INDEX) else location
    return ShardIndex.read(folder).classes

"""`elt encode`: pictures or clips to shards of latents or tokens, once, so that training need not do it each time."""

import argparse

from elt_lightning.commands import encode_images, encode_ucf101
from elt_lightning.commands.arguments import Parser


def run(name: str, arguments: list[str]) -> None:
    """Encode what the command line asks for.

    Raises:
        UserError: the command line, the pictures, their labels, the tokenizer or the output folder are wrong.
    """
    options = build_parser().parse_args(arguments)
    options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt encode", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="KIND", required=True, help="what is encoded")
    for kind, orientation, what in (
        ("images", "upright", "pictures in class folders, in folders with a list of labels, or in tars"),
        ("imagenet", "stored", "the same by ImageNet's protocol: cameras' orientation tags are not followed"),
    ):
        encode_images.add_arguments(kinds.add_parser(kind, help=what, allow_abbrev=False), orientation)
    encode_ucf101.add_arguments(
        kinds.add_parser("ucf101", help="clips of UCF-101, or laid out like it", allow_abbrev=False)
    )
    return parser

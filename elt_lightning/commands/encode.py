"""`elt encode`: pictures or clips to shards of latents or tokens, once, so that training need not do it each time."""

import argparse
import importlib
from collections.abc import Collection

from elt_lightning.commands.arguments import Parser

IMAGES, UCF101 = (f"elt_lightning.commands.encode_{kind}" for kind in ("images", "ucf101"))
KINDS: dict[str, tuple[str, tuple[str, ...], str]] = {  # its module, what that wants to know, the line of help
    "images": (IMAGES, ("upright",), "pictures in class folders, in folders with a list of labels, or in tars"),
    "imagenet": (IMAGES, ("stored",), "the same by ImageNet's protocol: cameras' orientation tags are not followed"),
    "ucf101": (UCF101, (), "clips of UCF-101, or laid out like it"),
}


def run(name: str, arguments: list[str]) -> None:
    """Encode what the command line asks for.

    Raises:
        UserError: the command line, the pictures, their labels, the tokenizer or the output folder are wrong.
    """
    options = build_parser(arguments[:1]).parse_args(arguments)
    options.run(options)


def build_parser(asked: Collection[str] = tuple(KINDS)) -> argparse.ArgumentParser:
    """Describe the command line of the kinds ``asked`` for: the others' modules stay out, and with them Lightning."""
    parser = Parser(prog="elt encode", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="KIND", required=True, help="what is encoded")
    for kind, (module, protocol, what) in KINDS.items():
        flags = kinds.add_parser(kind, help=what, allow_abbrev=False)
        if kind in asked:
            importlib.import_module(module).add_arguments(flags, *protocol)
    return parser

"""`elt loop`: an unlooped model of N·L layers as N shared layers, to be trained on at L loops."""

import argparse
from pathlib import Path
from typing import get_args

from elt_lightning.checkpoints.initial import Init, looped
from elt_lightning.checkpoints.pretrained import read_pretrained, weights_in
from elt_lightning.commands.arguments import Parser, whole
from elt_lightning.commands.export import check_free, describe, tokenizer_beside, write_model


def run(name: str, arguments: list[str]) -> None:
    """Write what the command line asks for (UserError: it or the model is wrong, or the folder cannot be written)."""
    options = build_parser().parse_args(arguments)
    check_free(options.output, options.overwrite)
    checkpoint = read_pretrained(options.source)
    section, module, line = looped(
        checkpoint, options.layers, options.loops, options.init, options.prelude, options.coda, options.recall
    )
    checkpoint["elt"] = checkpoint["elt"] | {"model": section}
    description = describe(checkpoint | {"global_step": 0}, weights_in(checkpoint))
    write_model(options.output, module, description, tokenizer_beside(checkpoint))
    print(f"{line}\n{options.output}\nnext: elt fit --config CONFIG --init_from {options.output}")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt loop", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    source = "checkpoint or model folder, unlooped"
    add("--from", required=True, dest="source", metavar="DIR", help=source)
    add("--layers", required=True, type=whole(1), metavar="N", help="shared layers")
    add("--loops", required=True, type=whole(2), metavar="L", help="loops; N·L is the layers of DIR, less those below")
    add("--init", choices=get_args(Init), default="average", help="how the shared layers are made (default average)")
    add("--prelude", type=whole(0), default=0, metavar="P", help="first layers, kept before the loop (default 0)")
    add("--coda", type=whole(0), default=0, metavar="C", help="last layers, kept after the loop (default 0)")
    add("--recall", action="store_true", help="every loop reads the input again")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write; it is made")
    add("--overwrite", action="store_true", help="replace a model that is there")
    return parser

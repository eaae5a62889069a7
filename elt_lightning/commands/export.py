"""`elt export`: a checkpoint's model as a folder to publish: model.safetensors and config.json."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.checkpoints.recipe import FORMAT_VERSION
from elt_lightning.checkpoints.store import CONFIG, WEIGHTS, read_checkpoint
from elt_lightning.commands.arguments import Parser
from elt_lightning.errors import UserError
from elt_lightning.files import written_aside
from elt_lightning.model import ELTModel


def run(name: str, arguments: list[str]) -> None:
    """Write what the command line asks for.

    Raises:
        UserError: the command line or the checkpoint is wrong, or the folder cannot be written.
    """
    options = build_parser().parse_args(arguments)
    check_free(options.output, options.overwrite)
    checkpoint = read_checkpoint(options.ckpt_path)
    module = build_module(checkpoint, options.weights)  # what cannot be built is not exported
    write_model(options.output, module, describe(checkpoint, options.weights))
    print(options.output)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt export", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="PATH", help="checkpoint of elt fit")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write; it is made")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged weights (default) or raw ones")
    add("--overwrite", action="store_true", help="replace a model that was exported there")
    return parser


def describe(checkpoint: dict[str, Any], weights: str) -> dict[str, Any]:
    """Describe in plain data what the weights are of: the content of ``config.json``.

    Of the data there is what the model depends on, not where they lay.
    """
    recipe = checkpoint["elt"]
    network = recipe["model"]["network"].get("init_args", {})
    return {
        "version": FORMAT_VERSION,
        "weights": weights,
        "step": checkpoint["global_step"],
        "data": {
            "class_path": recipe["data"]["class_path"],
            "num_classes": recipe["model"]["num_classes"],
            "input_shape": network.get("input_shape"),
            "codebook_size": network.get("codebook_size"),
        },
        "tokenizer": recipe["tokenizer"],
        "model": recipe["model"],
    }


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that a model may be written into a folder.

    Raises:
        UserError: there is one.
    """
    taken = [file for file in (WEIGHTS, CONFIG) if (folder / file).exists()]
    if taken and not overwrite:
        raise UserError(f"{folder} has a {taken[0]}: choose another --output, or add --overwrite")


def write_model(folder: Path, module: ELTModel, description: dict[str, Any]) -> None:
    """Write both files aside, then give both their names: whatever fails, an older export there stays as it was.

    Raises:
        UserError: they cannot be written.
    """
    # The format refuses tensors that share memory, as tied weights do.
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        with written_aside(folder / CONFIG) as config, written_aside(folder / WEIGHTS) as weights:
            config.write_text(json.dumps(description, indent=1) + "\n", "utf-8")
            save_file(state, weights, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {error}") from error

"""`elt export`: a checkpoint's model as a folder to publish, or for other programs, any number of loops long."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from elt_lightning.checkpoints.graphs import ONNX_FILES, PROGRAM, check_onnx, write_onnx, write_program
from elt_lightning.checkpoints.pretrained import build_module, meant, read_pretrained
from elt_lightning.checkpoints.recipe import FORMAT_VERSION, found
from elt_lightning.checkpoints.store import CONFIG, TOKENIZER, WEIGHTS, Weights
from elt_lightning.commands.arguments import Parser, add_weights_argument
from elt_lightning.errors import UserError
from elt_lightning.files import folder_aside
from elt_lightning.model import ELTModel
from elt_lightning.tokenizers.loading import load_tokenizer

FILES = {"safetensors": (), "onnx": ONNX_FILES, "torch": (PROGRAM,)}
"""What each format adds to the model folder, ``model.safetensors`` and ``config.json``."""


def run(name: str, arguments: list[str]) -> None:
    """Write what the command line asks for.

    Raises:
        UserError: the command line or the checkpoint is wrong, a package is missing, or the folder cannot be written.
    """
    options = build_parser().parse_args(arguments)
    check_free(options.output, options.overwrite)
    if options.format == "onnx":
        check_onnx()
    checkpoint = read_pretrained(options.ckpt_path)
    tokenizer = file_of_tokenizer(checkpoint) if options.with_tokenizer else tokenizer_beside(checkpoint)
    if options.with_tokenizer and tokenizer is None:
        raise UserError("--with_tokenizer: this model's tokenizer is not read from one file: leave the flag out")
    export(checkpoint, options.weights, options.output, tokenizer, options.format)
    print(options.output)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt export", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--ckpt_path",
        required=True,
        metavar="PATH",
        help="checkpoint, exported model, name of elt models or on Hugging Face",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write; it is made")
    add(
        "--format",
        choices=tuple(FILES),
        default="safetensors",
        help="safetensors: model.safetensors and config.json, which elt reads; onnx: with them, in float32, graphs of "
        "embedding, loop and exit for onnxruntime, and a runner; torch: with them a program for torch.export.load",
    )
    add_weights_argument(parser)
    add("--with_tokenizer", action="store_true", help="copy the tokenizer's file too: the folder then draws anywhere")
    add("--overwrite", action="store_true", help="replace a model that was exported there")
    return parser


def describe(checkpoint: dict[str, Any], weights: str) -> dict[str, Any]:
    """Describe in plain data what the weights are of: the content of ``config.json``.

    Of the data there is what the model depends on, not where they lay; nor where a training's outer teacher lay.
    """
    recipe = checkpoint["elt"]
    alone = {"outer_teacher": None} if recipe["model"].get("outer_teacher") else {}
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
        "tokenizer": found(recipe, "tokenizer"),
        "model": recipe["model"] | alone,
    }


def export(
    checkpoint: dict[str, Any],
    weights: Weights | None,
    folder: Path,
    tokenizer: Path | None = None,
    form: str = "safetensors",
) -> None:
    """Write the model of a checkpoint into a folder, and its tokenizer's file beside it where that is given.

    Raises:
        UserError: the model cannot be built, or the folder cannot be written.
    """
    module = build_module(checkpoint, weights)  # what cannot be built is not exported
    write_model(folder, module, describe(checkpoint, meant(checkpoint, weights)), tokenizer, form)


def file_of_tokenizer(checkpoint: dict[str, Any]) -> Path | None:
    """Return the one file that a model's tokenizer is read from; None where it is not read from one.

    Raises:
        UserError: it is missing or another one.
    """
    tokenizer = load_tokenizer(found(checkpoint["elt"], "tokenizer"))
    is_read_from_one = tokenizer.init_args().keys() == {"path"} and Path(str(tokenizer.path)).is_file()
    return Path(str(tokenizer.path)) if is_read_from_one else None


def tokenizer_beside(checkpoint: dict[str, Any]) -> Path | None:
    """Return the tokenizer's file that lies in an exported model's folder and goes where the model goes, or None.

    Raises:
        UserError: it is another one.
    """
    is_beside = "exported" in checkpoint and any(Path(checkpoint["elt"]["folder"]).glob(f"{TOKENIZER}.*"))
    return file_of_tokenizer(checkpoint) if is_beside else None


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that a model, and a tokenizer's file beside it, may be written into a folder.

    Raises:
        UserError: there is one.
    """
    names = (WEIGHTS, CONFIG, *ONNX_FILES, PROGRAM, f"{TOKENIZER}.*")
    taken = [path.name for name in names for path in folder.glob(name)]
    if taken and not overwrite:
        raise UserError(f"{folder} has a {taken[0]}: choose another --output, or add --overwrite")


def write_model(
    folder: Path,
    module: ELTModel,
    description: dict[str, Any],
    tokenizer: Path | None = None,
    form: str = "safetensors",
) -> None:
    """Write all files aside, then give them their names: whatever fails, an older export there stays as it was.

    The description names the tokenizer's file beside it, where that is given.

    Files of another format, which an older export left there, are removed: they would be of another model.

    Raises:
        UserError: they cannot be written, or a format cannot hold the network.
    """
    if form == "onnx":
        module.float()
    if tokenizer is not None:
        beside = {"init_args": {"path": f"{TOKENIZER}{tokenizer.suffix}"}}
        description = description | {"tokenizer": description["tokenizer"] | beside}
    # The format refuses tensors that share memory, as tied weights do.
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        with folder_aside(folder) as aside:
            (aside / CONFIG).write_text(json.dumps(description, indent=1) + "\n", "utf-8")
            save_file(state, aside / WEIGHTS, metadata={"format": "pt"})
            if tokenizer is not None:
                shutil.copyfile(tokenizer, aside / f"{TOKENIZER}{tokenizer.suffix}")
            if form == "onnx":
                apart = write_onnx(module.network, aside, aside / WEIGHTS, module.codebook_size)
            elif form == "torch":
                apart = write_program(module.network, aside / PROGRAM, module.codebook_size, description)
            for file in {*ONNX_FILES, PROGRAM}.difference(FILES[form]):
                (folder / file).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    if form != "safetensors":
        print(f"compared with torch: predictions differ by at most {apart:.1g}")

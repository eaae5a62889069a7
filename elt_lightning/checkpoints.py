"""Checkpoints that say how to build what they hold.

Beside Lightning's own entries, a checkpoint of this project has ``elt``: the format's version, the resolved ``model``
and ``data`` sections of the config, and the tokenizer's description; and ``ema``, the averaged weights. All of it is
plain data: checkpoints are read with ``weights_only=True``, which runs no code from the file.
"""

import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from elt_lightning.callbacks.ema import averaged_weights
from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.module import ELTModule
from elt_lightning.tokenizers.base import Tokenizer

FORMAT_VERSION = 1


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU.

    Raises:
        UserError: the file is missing, is no checkpoint, is not one of ours, or comes from a newer version.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable checkpoint: it is damaged or of another kind") from error
    if not isinstance(checkpoint, dict) or "elt" not in checkpoint:
        raise UserError(f"{path} was not written by `elt fit`")
    if checkpoint["elt"]["version"] > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer elt_lightning: upgrade to read it")
    return checkpoint


def build_module(checkpoint: dict[str, Any], weights: Literal["ema", "raw"] = "ema") -> ELTModule:
    """Build the model that a checkpoint describes, with its averaged or raw weights, in eval mode on the CPU."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ELTModule, "model")
    module: ELTModule = parser.instantiate(parser.parse_object({"model": checkpoint["elt"]["model"]})).model
    state = averaged_weights(checkpoint) if weights == "ema" else checkpoint["state_dict"]
    module.load_state_dict(state)
    return module.eval()


def build_tokenizer(checkpoint: dict[str, Any], path: str | None = None) -> Tokenizer:
    """Build the tokenizer that a checkpoint was trained with.

    Args:
        checkpoint: from :func:`read_checkpoint`.
        path: where its file or folder lies now, when it has moved.

    Raises:
        UserError: the file is missing, or its content is not what the model was trained with.
    """
    description = dict(checkpoint["elt"]["tokenizer"])
    expected = description.pop("sha256", None)
    if expected is not None and path is not None:
        description["init_args"] = description["init_args"] | {"path": path}
    found = description["init_args"].get("path")
    another = UserError(f"{found} is not the tokenizer that the model was trained with (its sha256 differs)")
    if expected is not None and Path(found).is_file() and sha256(found) != expected:
        raise another  # without asking the constructor, which might take it for a damaged file of its own kind
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer)  # add_subclass_arguments would hide the constructor's UserError
    tokenizer: Tokenizer = parser.instantiate(parser.parse_object({"tokenizer": description})).tokenizer
    if expected is not None and tokenizer.description().get("sha256") != expected:
        raise another  # a folder, or a name on Hugging Face
    return tokenizer.eval()

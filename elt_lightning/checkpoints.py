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
from elt_lightning.module import ELTModule

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

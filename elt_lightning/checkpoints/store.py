"""Checkpoints that say how to build what they hold.

Beside Lightning's own entries, a checkpoint of this project has ``elt``: the format's version, the resolved ``model``
and ``data`` sections of the config, and the tokenizer's description; and ``ema``, the averaged weights. All of it is
plain data: checkpoints are read with ``weights_only=True``, which runs no code from the file.

An exported model is a folder with one set of weights in ``model.safetensors`` and a ``config.json`` with version, the
``model`` section, the tokenizer's description, and what the model has to know of its data.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elt_lightning.checkpoints.recipe import check_recipe, is_count, is_laid_out
from elt_lightning.checkpoints.shipped import FOLDER, names
from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.training.weights import META

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
"""The files of an exported model; the tokenizer's keeps its own suffix."""

Weights = Literal["ema", "raw"]
"""Which weights: the averaged ones, or those that the optimiser moved."""


def is_weight(value: Any) -> bool:
    """Return whether a value is a plain tensor; None stands where one of a sharded checkpoint was not read."""
    if not isinstance(value, Tensor):
        return value is None
    return value.layout == torch.strided and not (value.is_meta or value.is_complex())


LAYOUT: dict[str, Any] = {
    "epoch": is_count,
    "global_step": is_count,
    "pytorch-lightning_version": str,
    "state_dict": {...: is_weight},
    "ema": {"updates": is_count, "weights": {...: is_weight}},
    "optimizer_states": [{"state": {...: dict}, "param_groups": [{"params": list}]}],
    "lr_schedulers": [{"last_epoch": is_count}],
    "loops": {"fit_loop": dict},
    "callbacks": {...: dict},
}
"""What a checkpoint holds beside its recipe; one may lack the average."""


def read_checkpoint(path: str | Path, prefixes: tuple[str, ...] = ("state_dict/", "ema/")) -> dict[str, Any]:
    """Read a checkpoint of this project, a file or a sharded one's folder, onto the CPU.

    A file's tensors are read when they are used; of a folder those are read whose place begins with ``prefixes``.

    Raises:
        UserError: the file is missing, is no checkpoint, is not one of ours, or comes from a newer version.
    """
    if (Path(path) / CONFIG).is_file():
        raise UserError(
            f"{path} is an exported model, not a checkpoint: `elt test`, `predict` and `sample` take it for one, and "
            "`elt fit` with --init_from"
        )
    is_sharded = (Path(path) / META).is_file()
    if not (is_sharded or is_file(path)):
        known = f": the model of that name that comes along is {FOLDER / str(path)}" if str(path) in names() else ""
        raise UserError(f"there is no checkpoint {path}{known}")
    try:
        if is_sharded:
            from elt_lightning.training.sharded_checkpoints import read_folder

            checkpoint = read_folder(Path(path), prefixes=prefixes)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # the unpickler raises anything on damaged bytes
        raise UserError(f"{path} is not a readable checkpoint: it is damaged or of another kind") from error
    if not (isinstance(checkpoint, dict) and {"elt", "state_dict"} <= checkpoint.keys()):
        raise UserError(f"{path} was not written by `elt fit`")
    check_recipe(path, checkpoint["elt"])
    for name, layout in LAYOUT.items():
        if not (is_laid_out(checkpoint.get(name), layout) or (name == "ema" and name not in checkpoint)):
            raise UserError(f"{path} was not written by `elt fit`, or is damaged: it has no {name} as they are written")
    return checkpoint

"""Checkpoints that say how to build what they hold.

Beside Lightning's own entries, a checkpoint of this project has ``elt``: the format's version, the resolved ``model``
and ``data`` sections of the config, and the tokenizer's description; and ``ema``, the averaged weights. All of it is
plain data: checkpoints are read with ``weights_only=True``, which runs no code from the file.

An exported model is a folder with one set of weights in ``model.safetensors`` and a ``config.json`` with version, the
``model`` section, the tokenizer's description, and what the model has to know of its data.
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elt_lightning.callbacks.ema import averaged_weights
from elt_lightning.errors import UserError
from elt_lightning.files import parse_json
from elt_lightning.module import ELTModule
from elt_lightning.sharded_checkpoints import META, read_folder

set_parsing_settings(import_path_denylist=[])  # a file may not name os.system and the like as a class

FORMAT_VERSION = 1

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The files of an exported model."""

Weights = Literal["ema", "raw"]
"""Which weights: the averaged ones, or those that the optimiser moved."""


def is_weight(value: Any) -> bool:
    """Say whether a value is a plain tensor; None stands where one of a sharded checkpoint was not read."""
    if not isinstance(value, Tensor):
        return value is None
    return value.layout == torch.strided and not (value.is_meta or value.is_complex())


def is_count(value: Any) -> bool:
    """Say whether a value is a whole number from 0 up."""
    return type(value) is int and value >= 0


def is_laid_out(value: Any, layout: Any) -> bool:
    """Say whether nested data are of a layout: a type, a test, ``[layout]`` of items, or of names those it lists.

    The name ``...`` stands for all names.
    """
    if isinstance(layout, list):
        return isinstance(value, list) and bool(value) and all(is_laid_out(item, layout[0]) for item in value)
    if isinstance(layout, dict):
        if not isinstance(value, dict):
            return False
        layout = dict.fromkeys(value, layout[...]) if ... in layout else layout
        return all(name in value and is_laid_out(value[name], inner) for name, inner in layout.items())
    return isinstance(value, layout) if isinstance(layout, type) else bool(layout(value))


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
    """Read a checkpoint of this project onto the CPU.

    Args:
        path: of a file, whose tensors are read when they are used; or of a sharded checkpoint, a folder.
        prefixes: of a sharded one, which tensors are read.

    Raises:
        UserError: the file is missing, is no checkpoint, is not one of ours, or comes from a newer version.
    """
    if (Path(path) / CONFIG).is_file():
        raise UserError(f"{path} is an exported model, not a checkpoint: `elt sample` and from_pretrained read it")
    is_sharded = (Path(path) / META).is_file()
    if not (is_sharded or Path(path).is_file()):
        raise UserError(f"there is no checkpoint {path}")
    try:
        checkpoint = (
            read_folder(Path(path), prefixes=prefixes)
            if is_sharded
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
    except UserError:
        raise
    except Exception as error:  # of damaged bytes the unpickler makes whatever it can
        raise UserError(f"{path} is not a readable checkpoint: it is damaged or of another kind") from error
    if not (isinstance(checkpoint, dict) and {"elt", "state_dict"} <= checkpoint.keys()):
        raise UserError(f"{path} was not written by `elt fit`")
    check_recipe(path, checkpoint["elt"])
    for name, layout in LAYOUT.items():
        if not (is_laid_out(checkpoint.get(name), layout) or (name == "ema" and name not in checkpoint)):
            raise UserError(f"{path} was not written by `elt fit`, or is damaged: it has no {name} as they are written")
    return checkpoint


def read_pretrained(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, the folder of an exported model, or such a folder on Hugging Face, onto the CPU.

    Args:
        source: a path, or ``owner/name`` on Hugging Face, which needs the package huggingface_hub.
        revision: branch, tag or commit there; None for the newest.

    Returns:
        what :func:`read_checkpoint` gives. Of an exported model it has ``elt``, ``state_dict``, and ``exported``, which
        says which weights these are.

    Raises:
        UserError: there is nothing of that name, or it cannot be read.
    """
    path, name = Path(source), str(source)
    if path.is_dir() and not (path / META).is_file():
        return read_exported(path)
    if path.exists() or name.endswith(".ckpt") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return read_checkpoint(path)
    return read_exported(fetch(name, revision))


def read_exported(folder: Path) -> dict[str, Any]:
    """Read an exported model; see :func:`read_pretrained`.

    Raises:
        UserError: a file is missing or damaged, or comes from a newer version.
    """
    try:
        recipe = parse_json((folder / CONFIG).read_bytes())
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} was not written by `elt export`, or is damaged: {error}") from error
    check_recipe(folder / CONFIG, recipe)
    if recipe.get("weights") not in get_args(Weights):
        raise UserError(f"{folder / CONFIG} does not say which weights lie beside it, ema or raw: export it again")
    return {"elt": recipe, "state_dict": weights, "exported": recipe["weights"]}


def check_recipe(path: str | Path, recipe: Any) -> None:
    """Check that what a file says of its model is complete, and that this version can read it.

    Raises:
        UserError: it is not.
    """
    layout = {"model": dict, "data": {"class_path": str}, "tokenizer": dict}
    if not (is_laid_out(recipe, layout) and "version" in recipe):
        raise UserError(f"{path} does not say how to build its model: it was not written by `elt`, or is damaged")
    if not is_count(recipe["version"]) or recipe["version"] == 0:
        raise UserError(f"{path} is damaged: its format has versions from 1 on, not {recipe['version']!r:.20}")
    if recipe["version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by a newer elt_lightning (version {recipe['version']} of the format, known here is "
            f"{FORMAT_VERSION}): upgrade to read it"
        )


def fetch(name: str, revision: str | None) -> Path:
    """Fetch an exported model from Hugging Face, or find it in the cache there is of it; give its folder.

    Raises:
        UserError: huggingface_hub is not installed, there is no such model, or no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(f"there is no {name}; to look on Hugging Face, pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"there is no {name} here, and Hugging Face gave none of that name: {reason}") from error


def build_module(checkpoint: dict[str, Any], weights: Weights = "ema") -> ELTModule:
    """Build the model that a checkpoint describes, with its averaged or raw weights, in eval mode on the CPU.

    Raises:
        UserError: the model cannot be built, has other weights than the checkpoint, or these are not in it.
    """
    state = chosen_weights(checkpoint, weights)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ELTModule, "model")
    try:
        module: ELTModule = parser.instantiate(parser.parse_object({"model": checkpoint["elt"]["model"]})).model
    except UserError:
        raise
    except Exception as error:  # whatever a class makes of settings that do not suit it
        raise UserError(f"the model that the checkpoint describes cannot be built: {error}") from error
    module.on_load_checkpoint({"state_dict": state})
    module.load_state_dict(state)
    if "ema" in checkpoint and weights == "ema":
        # Tied weights have several names, and their average has one of them: now it is under all.
        module.load_state_dict(checkpoint["ema"]["weights"], strict=False)
    return module.eval()


def chosen_weights(checkpoint: dict[str, Any], weights: Weights) -> dict[str, Tensor]:
    """Give the averaged or the raw weights of a checkpoint.

    Raises:
        UserError: it does not hold these.
    """
    exported = checkpoint.get("exported")
    if exported not in (None, weights):
        raise UserError(f"the exported model has {exported} weights alone: ask for them with --weights {exported}")
    if weights == "raw" or exported:
        return checkpoint["state_dict"]
    return averaged_weights(checkpoint)


def load_pretrained(source: str | Path, revision: str | None = None) -> ELTModule:
    """Build the model of a checkpoint or of an exported model; see :meth:`ELTModule.from_pretrained`."""
    checkpoint = read_pretrained(source, revision)
    return build_module(checkpoint, checkpoint.get("exported", "ema"))

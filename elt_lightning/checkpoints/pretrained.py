"""Building models from checkpoints, exported folders, and such folders on Hugging Face."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, set_parsing_settings
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elt_lightning.checkpoints import shipped
from elt_lightning.checkpoints.recipe import check_recipe
from elt_lightning.checkpoints.store import CONFIG, META, TOKENIZER, WEIGHTS, Weights, read_checkpoint
from elt_lightning.errors import UserError, first_line
from elt_lightning.files import parse_json
from elt_lightning.model import ELTModel
from elt_lightning.training.weights import averaged_weights, check_exported, check_weights

set_parsing_settings(import_path_denylist=[])  # a file may not name os.system and the like as a class

OF_TRAINING = ("optimizer", "learning_rate_schedule", "class_dropout_prob", "compile", "outer_teacher")
"""Settings of :class:`~elt_lightning.training.module.ELTModule` that a model which only draws has not."""


def from_pretrained(source: str | Path, revision: str | None = None) -> ELTModel:
    """Return the model that `elt export` or `elt fit` wrote, in eval mode on the CPU.

    Args:
        source: an exported folder; its name ``owner/name`` on Hugging Face; the name of a model that comes along, which
            `elt models` lists; or a checkpoint; see :func:`meant` for which weights.
        revision: branch, tag or commit on Hugging Face; None for the newest.

    Raises:
        UserError: there is no such model, it is damaged, or it comes from a newer version.
    """
    return build_module(read_pretrained(source, revision))


def read_pretrained(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, the folder of an exported model, or such a folder on Hugging Face, onto the CPU.

    Args:
        source: a path; ``owner/name`` on Hugging Face, which needs the package huggingface_hub; or the name of a model
            that comes along, unless a model or checkpoint lies at that path.
        revision: branch, tag or commit there; None for the newest.

    Returns:
        what :func:`read_checkpoint` returns; for an exported model ``elt``, ``state_dict``, and ``exported``, which
        names the weights.

    Raises:
        UserError: there is nothing of that name, or it cannot be read.
    """
    path, name = Path(source), str(source)
    is_model = is_exported(path) or path.is_file() or (path / META).is_file()
    if not is_model and (name in shipped.names() or (re.fullmatch(r"[\w-]+", name) and not path.exists())):
        return read_exported(shipped.folder_of(name))
    if path.is_dir() and not (path / META).is_file():
        return read_exported(path)
    if path.exists() or name.endswith(".ckpt") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return read_checkpoint(path)
    return read_exported(fetch(name, revision))


def read_exported(folder: Path) -> dict[str, Any]:
    """Read an exported model; see :func:`read_pretrained`.

    Raises:
        UserError: a file is missing or damaged, or comes from a newer version.
    """
    recipe = read_description(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} was not written by `elt export`, or is damaged: {error}") from error
    return {"elt": recipe, "state_dict": weights, "exported": recipe["weights"], "global_step": recipe.get("step")}


def read_description(folder: Path) -> dict[str, Any]:
    """Read what an exported model's ``config.json`` says of it.

    Raises:
        UserError: the file is missing or damaged, or comes from a newer version.
    """
    try:
        recipe: dict[str, Any] = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} was not written by `elt export`, or is damaged: {error}") from error
    check_recipe(folder / CONFIG, recipe)
    if recipe.get("weights") not in get_args(Weights):
        raise UserError(f"{folder / CONFIG} does not say which weights lie beside it, ema or raw: export it again")
    return recipe | {"folder": str(folder.resolve())}  # where a tokenizer's file may lie


def read_recipe(source: str | Path) -> dict[str, Any]:
    """Read how a checkpoint's or exported model's settings were, without its weights; as :func:`read_pretrained`."""
    if is_exported(source):
        return read_description(Path(source))
    if Path(source).is_file() or (Path(source) / META).is_file():
        return read_checkpoint(source, prefixes=())["elt"]
    return read_pretrained(source)["elt"]


def is_exported(path: str | Path) -> bool:
    """Return whether there is the folder of an exported model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / META).is_file()


def read_as_checkpoint(path: str | Path, **_: Any) -> dict[str, Any]:
    """Read an exported model, with what Lightning asks of a checkpoint that it tests or predicts from."""
    return read_exported(Path(path)) | {"pytorch-lightning_version": version("lightning"), "callbacks": {}}


def fetch(name: str, revision: str | None) -> Path:
    """Fetch an exported model from Hugging Face, or find it in the cache; return its folder.

    Raises:
        UserError: huggingface_hub is not installed, there is no such model, or no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(f"there is no {name}; to look on Hugging Face, pip install 'elt-lightning[hub]'") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, CONFIG, f"{TOKENIZER}.*"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no {name} here, and Hugging Face gave none of that name: {first_line(error)}"
        ) from error


def meant(checkpoint: dict[str, Any], weights: Weights | None = None) -> Weights:
    """Return which weights are meant: those asked for; by default those of an exported model, or the averaged ones.

    Raises:
        UserError: others were asked for than there can be.
    """
    if weights not in (None, *get_args(Weights)):
        raise UserError(f"weights are {' or '.join(get_args(Weights))}, not {weights!r}")
    chosen: Weights = weights or checkpoint.get("exported", "ema")
    return chosen


def weights_in(checkpoint: dict[str, Any]) -> Weights:
    """Return which weights to take of a checkpoint whatever it holds: averaged ones where there are any."""
    held: Weights = checkpoint.get("exported", "ema" if "ema" in checkpoint else "raw")
    return held


def build_module(checkpoint: dict[str, Any], weights: Weights | None = None) -> ELTModel:
    """Build the model that a checkpoint describes, with the weights that are :func:`meant`, in eval mode on the CPU.

    Raises:
        UserError: the model cannot be built, has other weights than the checkpoint, or these are not in it.
    """
    if "class_path" in checkpoint["elt"]["model"]:
        raise UserError("the checkpoint is of a tokenizer: `elt encode` takes the tokenizer.safetensors of its run")
    weights = meant(checkpoint, weights)
    state = chosen_weights(checkpoint, weights)
    module = empty_module(checkpoint["elt"]["model"])
    check_weights(module.state_dict(), state)
    module.load_state_dict(state)
    if "ema" in checkpoint and weights == "ema":
        # Tied weights have several names, their average only one: put it under all.
        module.load_state_dict(checkpoint["ema"]["weights"], strict=False)
    return module.eval()


def empty_module(section: dict[str, Any]) -> ELTModel:
    """Build the model that a recipe's ``model`` section describes, untrained, without what only training needs.

    Raises:
        UserError: it cannot be built.
    """
    section = {name: value for name, value in section.items() if name not in OF_TRAINING}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ELTModel, "model")
    try:
        module: ELTModel = parser.instantiate(parser.parse_object({"model": section})).model
    except UserError:
        raise
    except Exception as error:  # a class may raise anything on settings that do not suit it
        raise UserError(f"the model that the checkpoint describes cannot be built: {error}") from error
    return module


def chosen_weights(checkpoint: dict[str, Any], weights: Weights) -> dict[str, Tensor]:
    """Return the averaged or the raw weights of a checkpoint (UserError: it does not hold these)."""
    exported = checkpoint.get("exported")
    if exported:
        check_exported(exported, weights)
    if weights == "raw" or exported:
        return checkpoint["state_dict"]
    return averaged_weights(checkpoint)

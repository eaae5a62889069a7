"""The recipe in a checkpoint: how to build the model, the data module and the tokenizer again, as plain data."""

import os
from pathlib import Path
from typing import Any

from elt_lightning.errors import UserError

FORMAT_VERSION = 2
"""Of checkpoints and exported models; version 1 had other names of settings."""


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
    if recipe["version"] < FORMAT_VERSION:
        raise UserError(
            f"{path} was written by an older elt_lightning (version {recipe['version']} of the format, known here is "
            f"{FORMAT_VERSION}): train it again, or use the version that wrote it"
        )
    if recipe["version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by a newer elt_lightning (version {recipe['version']} of the format, known here is "
            f"{FORMAT_VERSION}): upgrade to read it"
        )


def found(recipe: dict[str, Any], section: str) -> dict[str, Any]:
    """Return a section of a checkpoint's recipe whose relative paths lie where the run was made, or else here.

    What the run's folder has is named by an absolute path; the rest is left to the current folder.
    """
    folder = str(recipe.get("folder", ""))
    return recipe[section] if folder in ("", os.getcwd()) else _found_in(folder, recipe[section])


def _found_in(folder: str, settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: value if key == "class_path" else _found_in(folder, value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_found_in(folder, value) for value in settings]
    is_there = isinstance(settings, str) and settings and os.path.exists(os.path.join(folder, settings))
    return os.path.join(folder, settings) if is_there else settings


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0 up."""
    return type(value) is int and value >= 0


def is_laid_out(value: Any, layout: Any) -> bool:
    """Return whether nested data are of a layout: a type, a test, ``[layout]`` of items, or of names those it lists.

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

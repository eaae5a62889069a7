"""The plan that `elt calibrate` writes, for those who only read it."""

from pathlib import Path
from typing import Any

from elt_lightning.checkpoints.recipe import is_laid_out
from elt_lightning.errors import UserError
from elt_lightning.files import parse_json
from elt_lightning.samplers.base import SETTINGS


def read_plan(path: str | Path) -> dict[str, Any]:
    """Read the best setting of a plan: {"loops": L, setting: value}.

    Raises:
        UserError: it is not there, or was not written by `elt calibrate`.
    """
    try:
        plan = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} was not written by `elt calibrate`: {error}") from error
    names = ("loops", *SETTINGS)
    if not is_laid_out(plan, {"best": {name: lambda value: True for name in names}}):
        raise UserError(f"{path} was not written by `elt calibrate`: it has no best setting")
    return {name: plan["best"][name] for name in names}

"""The plan that `elt calibrate` writes, for those who only read it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from elt_lightning.checkpoints.recipe import is_count, is_laid_out
from elt_lightning.checkpoints.store import Weights
from elt_lightning.errors import UserError
from elt_lightning.files import parse_json
from elt_lightning.samplers.loop_schedule import LoopShape

OF_MODEL = ("network", "process", "distillation", "sampler")
"""Sections of a model's recipe that a plan is for; data, optimiser and seed may be others."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


OF_BEST = {
    "loops": is_count,
    "steps": is_count,
    "carry_state": bool,
    "guidance": _is_number,
    "exit_scale": _is_number,
    "weak_loops": lambda value: value is None or is_count(value),
    "loop_schedule": lambda value: value in get_args(LoopShape),
    "tolerance": lambda value: value is None or _is_number(value),
}
"""What a plan has of its best setting, and what each may be."""


class Plan(NamedTuple):
    """What a plan says.

    Attributes:
        path: where it lies.
        settings: the best, by the names that flags have: ``loops``, those of the sampler, and ``weights``.
        model: what it is for, as :func:`of_model` says.
    """

    path: Path
    settings: dict[str, Any]
    model: dict[str, Any]

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a model that the plan is not for (UserError)."""
        here = of_model(recipe)
        if differing := [name for name in OF_MODEL if self.model.get(name) != here[name]]:
            raise UserError(
                f"{self.path} is of another model, whose {' and '.join(differing)} "
                f"{'differs' if len(differing) == 1 else 'differ'}: elt calibrate makes a plan of this one"
            )


def of_model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells for which models a plan is made, of a checkpoint's recipe."""
    return {name: recipe["model"].get(name) for name in OF_MODEL}


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: it is not there, or was not written by this version of `elt calibrate`.
    """
    try:
        plan = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} was not written by `elt calibrate`: {error}") from error
    layout = {"best": OF_BEST, "weights": lambda value: value in get_args(Weights), "model": dict}
    if not is_laid_out(plan, layout):
        raise UserError(f"{path} was not written by this version of `elt calibrate`: it has no best setting of a model")
    best = {name: plan["best"][name] for name in OF_BEST}
    return Plan(Path(path), best | {"weights": plan["weights"]}, plan["model"])

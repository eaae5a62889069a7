"""The trained models that come along with the package: a folder each, as `elt export` writes them, and their sweep.

Beside ``config.json``, ``model.safetensors`` and the tokenizer's file there are ``loops.json``, which `elt test` wrote,
and ``made.json``: what the model draws, the command and the seed that made it, its data's settings, the names of
its classes, and the means of a few samples. :mod:`elt_lightning.reproduce.ship` writes such a folder, in half
precision.
"""

import math
from pathlib import Path
from typing import Any

from elt_lightning.errors import UserError
from elt_lightning.files import parse_json

FOLDER = Path(__file__).parent.parent / "shipped"
SWEEP, MADE = "loops.json", "made.json"


def names() -> list[str]:
    """List the models that come along."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{MADE}"))


def folder_of(name: str) -> Path:
    """Return the folder of a model that comes along (UserError: there is none of that name)."""
    if name not in names():
        raise UserError(f"no model {name!r} comes along: there are {', '.join(names())}")
    return FOLDER / name


def read_json(name: str, file: str) -> dict[str, Any]:
    """Read one of the files that say what a model is."""
    content: dict[str, Any] = parse_json((folder_of(name) / file).read_bytes())
    return content


def recorded(sweep: dict[str, Any], loops: int | None = None) -> dict[str, Any]:
    """Return the best row of a sweep at a loop count, by default that of training."""
    rows = [row for row in sweep["rows"] if row["loops"] == (loops or sweep["train_loops"])]
    metric, higher_is_better = sweep["primary_metric"], sweep["higher_is_better"]
    return max(rows, key=lambda row: goodness(row["metrics"][metric]["mean"], higher_is_better))


def goodness(score: float, higher_is_better: bool) -> float:
    """Return what is largest for the best score; one that is not a number is worse than any."""
    return -math.inf if math.isnan(score) else score if higher_is_better else -score

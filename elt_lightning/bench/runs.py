"""The JSON files of `elt bench inference` and `train`: ``{"runs": [{device, device_type, …, command, rows}, …]}``."""

import json
import re
from pathlib import Path
from typing import Any

from elt_lightning.errors import UserError
from elt_lightning.files import write_json


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Read what was measured, the newest last; none where there is no file (UserError: the file is something else)."""
    if not path.is_file():
        return []
    try:
        runs = json.loads(path.read_text())["runs"]
        if not all({"device", "device_type", "command", "rows"} <= run.keys() for run in runs):
            raise ValueError("a run lacks its device, device_type, command or rows")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by `elt bench`: {error}") from error
    return runs


def add_run(path: Path, run: dict[str, Any]) -> None:
    """Add a run to a file, in place of an earlier one by the same command on the same device, wherever it wrote to."""

    def asked(of: dict[str, Any]) -> tuple[str, str]:
        return of["device"], re.sub(r" --output[ =]\S+", "", of["command"])

    others = [old for old in read_runs(path) if asked(old) != asked(run)]
    write_json(path, {"runs": [*others, run]})

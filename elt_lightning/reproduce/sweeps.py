"""What `elt test` left behind in ``loops.json``, and whether it may stand for a model of the paper."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from elt_lightning.errors import UserError
from elt_lightning.metrics.video_protocols import video_protocol
from elt_lightning.reproduce.accounting import count_row
from elt_lightning.reproduce.published import TABLE_1, TABLE_2, TABLE_4, Row

PAPERS_PROTOCOL = f"protocol {video_protocol('magvit-10kx4').name}"
"""What the feature network of an FVD must name to stand beside those of Table 4."""


OFF = {"carry_state": False, "exit_scale": 0, "loop_schedule": "constant", "tolerance": None}
"""Settings of samplers that the paper does not have, and what turns them off."""


def read_sweep(path: Path) -> dict[str, Any]:
    """Read a ``loops.json`` (UserError: it is damaged, or was written by something else or by an earlier version)."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        lacking = {"rows", "primary_metric", "train_loops", "train_mode", "train_steps", "weights"} - report.keys()
        if lacking or not report["rows"]:
            raise ValueError(f"it has no {', '.join(sorted(lacking)) or 'rows'}")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} was not written by this version of `elt test` ({error}): remove it and test again"
        ) from error
    return report


def rows_of(name: str) -> list[Row]:
    """Return the rows of Tables 1, 2 and 4 that a config belongs to; none if it is not one of the paper's."""
    return [row for row in (*TABLE_1, *TABLE_2, *TABLE_4) if row.name == name]


def steps_of(report: dict[str, Any], row: dict[str, Any]) -> int:
    """Return the sampling steps of a row; before they could be swept, a sweep had one number for all."""
    return int(row.get("steps", report["sampling_steps"]))


def drawn_alike(report: dict[str, Any], rows: Collection[Row]) -> list[dict[str, Any]]:
    """Return a sweep's rows whose samples were drawn as the paper's: in as many steps, and with nothing that is new."""
    steps = {row.steps for row in rows}
    return [
        row
        for row in report["rows"]
        if steps_of(report, row) in steps and all(row.get(name, off) == off for name, off in OFF.items())
    ]


def difference(report: dict[str, Any], rows: Collection[Row], mode: str = "ilsd") -> str | None:
    """Return what sets a sweep apart from what the paper measured; None where nothing does.

    Args:
        report: the sweep, of one network.
        rows: of one model of the paper; sampling took the steps of one of them.
        mode: of training, which unlooped models do not have.
    """
    steps = sorted({row.steps for row in rows})
    sizes = {count.params_backbone for count in map(count_row, rows) if count is not None}
    params_backbone = report["rows"][0]["params_backbone"]
    if params_backbone not in sizes:
        return f"its network is another one, with {params_backbone:,} parameters in the layers"
    if report["train_loops"] > 1 and report["train_mode"] != mode:
        return f"it was trained by {report['train_mode']}, not by {mode}"
    if report["weights"] != "ema":
        return f"it is of the {report['weights']} weights, not of their average"
    taken = sorted({steps_of(report, row) for row in report["rows"]})
    if not set(taken) & set(steps):
        return f"sampling took {' or '.join(map(str, taken))} steps, not {' or '.join(map(str, steps))}"
    if not drawn_alike(report, rows):
        return f"none of its samples were drawn without {', '.join(OFF)}"
    if any(row.fvd for row in rows) and PAPERS_PROTOCOL not in str(report["feature_network"]):
        return f"its protocol is not the paper's, {PAPERS_PROTOCOL}, but {report['feature_network']}"
    return None

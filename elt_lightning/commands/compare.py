"""`elt compare`: the sweeps of several runs on one sheet, runs that differ in their seed alone as one curve."""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from elt_lightning.commands.arguments import Parser
from elt_lightning.errors import UserError, first_line
from elt_lightning.evaluation.comparison import Curve, sheet, table
from elt_lightning.evaluation.pictures import write_figure
from elt_lightning.files import next_numbered, parse_json, write_text

SETTINGS = ("steps", "guidance", "weak_loops", "exit_scale", "carry_state", "loop_schedule", "tolerance")
"""Columns of ``loops.json`` that were swept where they differ between its rows."""

MEASURED = ("num_samples", "parts_given", "feature_network", "weights")
"""What ``loops.json`` says of a whole sweep: scores that differ in it are of other things, or of other accuracy."""

OF_ONE_RUN = ("seed_everything", "model.seed", "data.init_args.seed", "run_dir", "trainer.default_root_dir")
"""Where a run's seed and its folder stand in the ``config.yaml`` of `elt fit`."""


def run(name: str, arguments: list[str]) -> None:
    """Read the runs, print their table, and write table and picture.

    Raises:
        UserError: a run has no sweep, or the runs do not share a metric; or there is a comparison already.
    """
    options = build_parser().parse_args(arguments)
    if options.output is not None and not options.overwrite and any(options.output.glob("compare.*")):
        raise UserError(f"{options.output} has a comparison: choose another --output, or add --overwrite")
    sweeps = []
    for text in options.runs:
        label, _, place = ("", "", text) if Path(text).exists() else text.rpartition("=")
        path = sweep_of(Path(place))
        sweeps.append((label, path, read_sweep(path)))
    metric = options.metric or sweeps[0][2]["primary_metric"]
    groups: dict[tuple[str, str], list[tuple[str, Path, dict[str, Any]]]] = defaultdict(list)
    for label, path, sweep in sweeps:
        if any(metric not in row["metrics"] for row in sweep["rows"]):
            known = ", ".join(sweep["rows"][0]["metrics"])
            raise UserError(f"{path} has no {metric}, but {known}: choose a --metric that all runs have")
        groups[label, recipe_of(path)].append((label, path, sweep))
    differing = [key for key in MEASURED if len({str(sweep.get(key)) for _, _, sweep in sweeps}) > 1]
    curves = [curve for group in groups.values() for curve in curves_of(group, metric, differing)]
    if len({curve.label for curve in curves}) < len(curves):
        raise UserError("runs of different configs have the same name: name them, as in ours=runs/a theirs=runs/b")
    first = sweeps[0][2]
    higher = bool(first["higher_is_better"]) if metric == first["primary_metric"] else not is_distance(metric)
    folder = options.output or next_numbered("runs", "compare")
    text = table(curves, metric, in_percent=higher and all((curve.scores <= 1).all(axis=None) for curve in curves))
    print(text, end="")
    write_text(folder / "compare.md", text)
    write_figure(folder / "compare.png", sheet(curves, metric, higher))
    print("\n".join(str(folder / f"compare.{ending}") for ending in ("png", "md")))


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt compare", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of elt fit or elt test, or a loops.json; NAME=RUN names it")
    add("--metric", help="which score is compared; by default the primary metric of the first run")
    add("--output", type=Path, metavar="DIR", help="folder of compare.png and compare.md (default: a new one in runs)")
    add("--overwrite", action="store_true", help="replace a comparison that is there")
    return parser


def is_distance(metric: str) -> bool:
    """Return whether less of a metric is better."""
    return metric.startswith(("fd_", "fid", "sfid", "fvd")) or metric == "loss"


def sweep_of(path: Path) -> Path:
    """Find the ``loops.json`` of a run.

    Raises:
        UserError: there is none, or there are several.
    """
    if path.is_file():
        return path
    if (path / "loops.json").is_file():
        return path / "loops.json"
    found = sorted(path.glob("*/loops.json"))
    if len(found) != 1:
        several = f"several sweeps, name one: {', '.join(str(file.parent) for file in found)}"
        raise UserError(f"{path} has {several if found else 'no loops.json of elt test'}")
    return found[0]


def read_sweep(path: Path) -> dict[str, Any]:
    """Read a ``loops.json``.

    Raises:
        UserError: it is something else.
    """
    try:
        sweep: dict[str, Any] = parse_json(path.read_text())
        needed = ("loops", "macs_per_sample", "params_backbone", "metrics")
        if not sweep["rows"] or any(name not in row for row in sweep["rows"] for name in needed):
            raise ValueError("its rows lack something")
        for row in sweep["rows"]:
            for score in row["metrics"].values():
                float(score["mean"])
        return {"primary_metric": sweep["primary_metric"], "higher_is_better": sweep["higher_is_better"]} | sweep
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no loops.json of elt test: {error}") from error


def recipe_of(sweep: Path) -> str:
    """Return the config that a sweep's model was trained by, :data:`OF_ONE_RUN` aside, as text.

    Without a config it is the sweep's path.

    Raises:
        UserError: the file is something else than a config.
    """
    config = run_of(sweep) / "config.yaml"
    if not config.is_file():
        return str(sweep.resolve())
    try:
        settings = yaml.safe_load(config.read_text("utf-8"))
        for place in OF_ONE_RUN:
            *sections, name = place.split(".")
            section = settings
            for each in sections:
                section = section.get(each) or {}
            section.pop(name, None)
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise UserError(f"{config} is no config of elt fit: {first_line(error)}") from error
    return json.dumps(settings, sort_keys=True)


def run_of(sweep: Path) -> Path:
    """Return the folder of the run whose model was swept; the sweep's own where it lies in none."""
    folders = sweep.resolve().parent, sweep.resolve().parent.parent
    runs = (folder for folder in folders if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file())
    return next(runs, folders[0])


def curves_of(group: list[tuple[str, Path, dict[str, Any]]], metric: str, differing: Sequence[str] = ()) -> list[Curve]:
    """Join the sweeps of one recipe: a curve for each setting of the sampler that was swept.

    Sweeps of one run are no seeds: where they measured the same setting, their mean counts.

    Args:
        group: label, path and content of each sweep.
        metric: what is compared.
        differing: those of :data:`MEASURED` that are not the same in all that is compared: they are named.
    """
    label, path, first = group[0]
    runs = list(dict.fromkeys(run_of(path) for _, path, _ in group))
    run = path.parent.parent if path.parent.name.startswith("test") else path.parent
    name = label or (run.name if len(runs) == 1 else f"{run.name} and {len(runs) - 1} more")
    rows = pd.DataFrame(
        {"seed": runs.index(run_of(path)), "score": row["metrics"][metric]["mean"]}
        | {key: row[key] for key in ("loops", "macs_per_sample", "params_backbone")}
        | {key: str(row.get(key)) for key in SETTINGS}
        | {key: str(sweep.get(key)) for key in differing}
        for _, path, sweep in group
        for row in sweep["rows"]
    )
    swept = [*(setting for setting in SETTINGS if rows[setting].nunique() > 1), *differing]
    curves = []
    for values, part in rows.groupby(swept, sort=False) if swept else [((), rows)]:
        words = ", ".join(f"{setting} {value}" for setting, value in zip(swept, values, strict=True))
        curves.append(
            Curve(
                f"{name}, {words}" if words else name,
                part.pivot_table(index="loops", columns="seed", values="score"),
                part.groupby("loops")["macs_per_sample"].mean(),  # with a tolerance each seed's are its own
                int(first.get("train_loops", 1)),
                int(part["params_backbone"].iloc[0]),
            )
        )
    return curves

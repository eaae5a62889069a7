"""`make any-time`: quality against compute, of runs that `make recall` and its like have trained, at many settings.

Every checkpoint is measured at the settings that the grids of ``experiments/any_time.yaml`` name for its recipe. The
measurements of one checkpoint are one file below the results, ``runs/<testbed>_<recipe>_seed<seed>.json``, with a
record for each setting, written when it is measured: what has a record is not measured again. Runs that are not there
yet are named and left out; recipes of other experiments, such as unlooped models, are taken from their results.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from elt_lightning.cli import status_of
from elt_lightning.commands.train import quieten_libraries
from elt_lightning.errors import UserError
from elt_lightning.evaluation.calibration import Tried, pareto_front
from elt_lightning.evaluation.report import in_words
from elt_lightning.evaluation.sweep import Sweep, swept_settings
from elt_lightning.evaluation.trained import Trained
from elt_lightning.files import markdown_table, write_json, write_text, written_aside
from elt_lightning.model import AUTO_LOOPS
from elt_lightning.reproduce.commands import last_checkpoint
from elt_lightning.samplers.base import SETTINGS, Sampler

SECTIONS = {"seeds", "paper", "ours", "recipes", "grids", "testbeds"}


@dataclass(frozen=True)
class Run:
    """One checkpoint, and what is to be measured of it."""

    name: str  # of its records: testbed, recipe and seed
    checkpoint: Path
    grids: list[dict[str, list[Any]]]  # every combination of each; steps are shares of the model's own
    num_samples: int
    records: Path


def main() -> None:
    """Measure what is missing, and write the results."""
    parser = argparse.ArgumentParser(prog="any_time", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", type=Path, default=Path("experiments/any_time.yaml"))
    add("--runs", type=Path, default=Path("runs"), help="where runs/<experiment>/<arm>_seed<seed> lie")
    add("--output", type=Path, help="folder of the results; by default docs/results/<config>")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="checkpoints measured at once, one thread each")
    add("--testbeds", help="comma-separated: these alone")
    add("--num_samples", type=int, help="in place of what the testbeds say")
    options = parser.parse_args()
    config, output = read_config(options.config), options.output or Path("docs/results", options.config.stem)
    chosen = options.testbeds.split(",") if options.testbeds else list(config["testbeds"])
    if unknown := set(chosen) - set(config["testbeds"]):
        raise UserError(f"there is no testbed {', '.join(sorted(unknown))}: there are {', '.join(config['testbeds'])}")
    runs = list(runs_of(config, chosen, options.runs, output, options.num_samples))
    missing = [run for run in runs if not run.checkpoint.is_file()]
    if missing:
        print(f"not trained yet, and left out: {', '.join(str(run.checkpoint.parents[1]) for run in missing)}")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(measure, run) for run in runs if run not in missing]
        try:
            for done, future in enumerate(as_completed(work), start=1):
                print(f"[{done}/{len(work)}] {future.result()}", flush=True)
        finally:  # what was measured is laid out, after an error too
            pool.shutdown(wait=True, cancel_futures=True)
            write_results(config, output)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``any_time.yaml`` (UserError: it lacks a section, or has one that nothing reads)."""
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or set(config) != SECTIONS:
        raise UserError(f"{path} must have the sections {', '.join(sorted(SECTIONS))}")
    return config


def runs_of(
    config: dict[str, Any], testbeds: Sequence[str], runs: Path, output: Path, num_samples: int | None
) -> Iterator[Run]:
    """Yield the checkpoints of some testbeds, seed by seed."""
    for seed, name in product(config["seeds"], testbeds):
        testbed = config["testbeds"][name]
        for recipe, described in config["recipes"].items():
            run = f"{recipe}_seed{seed}"
            yield Run(
                f"{name}_{run}",
                last_checkpoint(runs / testbed["runs"] / run),
                [config["grids"][grid] for grid in described["grids"]],
                num_samples or testbed["num_samples"],
                records_path(output, name, recipe, seed),
            )


def records_path(output: Path, testbed: str, recipe: str, seed: int) -> Path:
    """Return where the records of one checkpoint are."""
    return output / "runs" / f"{testbed}_{recipe}_seed{seed}.json"


def measure(run: Run) -> str:
    """Measure what a checkpoint lacks, a record after the other: a line that says how many were new.

    Raises:
        UserError: it was measured with another number of samples, or trained further since.
    """
    torch.set_num_threads(1)
    quieten_libraries()
    trained = Trained(run.checkpoint, torch.device("cpu"))
    module = trained.module
    about = {
        "num_samples": run.num_samples,
        "train_steps": trained.train_steps,
        "train_loops": module.max_loops,
        "sampling_steps": module.sampler.steps,
        "primary_metric": trained.data.primary_metric,
        "higher_is_better": trained.data.higher_is_better,
    }
    content: dict[str, Any] = json.loads(run.records.read_text()) if run.records.is_file() else about | {"records": []}
    if {name: content.get(name) for name in about} != about:
        raise UserError(f"{run.records} was measured of other weights, or otherwise: delete it to measure again")
    done = {key_of(record) for record in content["records"]}
    new = 0
    for loops, sampler in settings_of(run.grids, module.sampler, module.max_loops, module.network.has_recall):
        if (loops, *sampler.settings().values()) in done:
            continue
        row = trained.measure(loops, sampler, Sweep(run.num_samples, 250, seed=0, num_pictures=0))
        record = {"loops": loops, **row.settings, "mean_loops": row.mean_loops, "macs_per_sample": row.macs_per_sample}
        record |= {"samples_per_second": row.samples_per_second}
        content["records"].append(record | {"metrics": {name: row.mean(name) for name in row.metrics}})
        write_json(run.records, content)
        new += 1
    return f"{run.name}: {new} settings measured, {len(done)} before"


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells one setting from another."""
    return (record["loops"], *(record[name] for name in SETTINGS))


def settings_of(
    grids: Sequence[dict[str, list[Any]]], sampler: Sampler, max_loops: int, has_recall: bool
) -> list[tuple[int, Sampler]]:
    """List loop counts and samplers of some grids, each once; what `elt test` would leave out is left out."""
    found: dict[tuple[Any, ...], tuple[int, Sampler]] = {}
    for grid in grids:
        loops = [AUTO_LOOPS * max_loops if count == "auto" else count for count in grid["loops"]]
        swept = {name: values for name, values in grid.items() if name != "loops"}
        swept["steps"] = [max(1, round(share * sampler.steps)) for share in grid["steps"]]
        for count, changed in swept_settings(loops, sampler, swept, has_recall)[0]:
            found.setdefault((count, *changed.settings().values()), (count, changed))
    return list(found.values())


def summarise(config: dict[str, Any], output: Path) -> dict[str, Any]:
    """Gather the records: of each testbed a row for each recipe and setting, over the seeds that have it."""
    summary: dict[str, Any] = {"testbeds": {}}
    for name, testbed in config["testbeds"].items():
        contents = {
            (recipe, seed): json.loads(path.read_text())
            for recipe, seed in product(config["recipes"], config["seeds"])
            if (path := records_path(output, name, recipe, seed)).is_file()
        }
        if not contents:
            continue
        about = next(iter(contents.values()))
        metric = testbed.get("metric", about["primary_metric"])
        rows = list(recorded_rows(testbed.get("recorded", {}), output.parent, metric))
        for recipe in config["recipes"]:
            by_setting: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
            for (of, seed), content in contents.items():
                for record in content["records"] if of == recipe else ():
                    by_setting.setdefault(key_of(record), {})[seed] = record
            rows += [row_of(recipe, records, metric) for records in by_setting.values()]
        about = {key: about[key] for key in ("num_samples", "train_loops", "sampling_steps", "higher_is_better")}
        summary["testbeds"][name] = {"metric": metric} | about | {"rows": rows} | verdict(rows, config, about)
    return summary


def row_of(recipe: str, records: dict[int, dict[str, Any]], metric: str) -> dict[str, Any]:
    """Return one row, given {seed: record}: means over seeds, of the metric the sample standard deviation too."""
    values = [record["metrics"][metric] for record in records.values()]
    first = next(iter(records.values()))
    return {
        "recipe": recipe,
        "setting": {"loops": first["loops"]} | {name: first[name] for name in SETTINGS},
        "mean_loops": mean(record["mean_loops"] for record in records.values()),
        "steps": first["steps"],
        "macs_per_sample": round(mean(record["macs_per_sample"] for record in records.values())),
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "seeds": sorted(records),
        "values": [records[seed]["metrics"][metric] for seed in sorted(records)],
    }


def recorded_rows(recorded: dict[str, list[str]], results: Path, metric: str) -> Iterator[dict[str, Any]]:
    """Yield rows of arms of other experiments, {experiment: arms}, as their own summaries have them."""
    for experiment, arms in recorded.items():
        path = results / experiment / "ablation.json"
        summary = json.loads(path.read_text()) if path.is_file() else {"arms": {}}
        for arm in arms:
            for row in summary["arms"].get(arm, {"rows": ()})["rows"]:
                values = row["metrics"][metric]
                yield {
                    "recipe": arm,
                    "setting": {"loops": row["loops"], "guidance": row["guidance"]},
                    "mean_loops": row["loops"],
                    "steps": summary["sampling_steps"],
                    "macs_per_sample": row["macs_per_sample"],
                    "mean": mean(values),
                    "std": stdev(values) if len(values) > 1 else None,
                    "seeds": summary["config"]["seeds"],
                    "values": values,
                }


def verdict(rows: Sequence[dict[str, Any]], config: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Compare ours with the paper's recipe, where it is measured at L_max with all its steps and nothing else.

    Returns:
        ``compute_ratio_at_equal_quality``: the compute of our cheapest setting that is as good, over the recipe's;
        None where none is. ``quality_at_equal_compute``: the best that either reaches without more compute.
        ``paper_at_l_max``: the row they are compared with. Only rows over the same seeds are.
    """
    sign = 1 if about["higher_is_better"] else -1
    wanted = {
        "loops": about["train_loops"], "steps": about["sampling_steps"], "exit_scale": 0, "carry_state": False,
        "loop_schedule": "constant", "tolerance": None,
    }  # fmt: skip
    paper = [row for row in rows if row["recipe"] == config["paper"]]
    marks = [row for row in paper if {name: row["setting"][name] for name in wanted} == wanted]
    none = {"compute_ratio_at_equal_quality": None, "quality_at_equal_compute": {"paper": None, "ours": None}}
    if not marks:
        return none
    mark = marks[0]
    ours = [row for row in rows if row["recipe"] in config["ours"] and row["seeds"] == mark["seeds"]]
    as_good = [row["macs_per_sample"] for row in ours if sign * row["mean"] >= sign * mark["mean"]]
    affordable = [
        [sign * row["mean"] for row in of if row["macs_per_sample"] <= mark["macs_per_sample"]]
        for of in ([row for row in paper if row["seeds"] == mark["seeds"]], ours)
    ]
    best = [sign * max(values) if values else None for values in affordable]
    return {
        "compute_ratio_at_equal_quality": min(as_good) / mark["macs_per_sample"] if as_good else None,
        "quality_at_equal_compute": {"paper": best[0], "ours": best[1]},
        "paper_at_l_max": mark,
    }


def write_results(config: dict[str, Any], folder: Path) -> None:
    """Write ``any_time.json``, ``.png`` and ``.md``, where anything was measured."""
    summary = summarise(config, folder)
    if not summary["testbeds"]:
        return
    write_json(folder / "any_time.json", summary)
    with written_aside(folder / "any_time.png") as aside:
        figure(summary, config).savefig(aside, bbox_inches="tight")
    write_text(
        folder / "any_time.md", "\n".join(page(name, each, config) for name, each in summary["testbeds"].items())
    )
    print("\n".join(str(folder / f"any_time.{ending}") for ending in ("png", "md", "json")))


def front_of(rows: Sequence[dict[str, Any]], higher_is_better: bool) -> list[dict[str, Any]]:
    """Return the rows that no other is as cheap as and better."""
    by_score = {(row["macs_per_sample"], row["mean"]): row for row in rows}
    tried = [Tried(0, {}, 0.0, *key) for key in by_score]
    return [by_score[each.macs_per_sample, each.score] for each in pareto_front(tried, higher_is_better)]


def recipes_in(rows: Sequence[dict[str, Any]]) -> list[str]:
    """List the recipes of some rows, in order."""
    return list(dict.fromkeys(row["recipe"] for row in rows))


def label_of(recipe: str, config: dict[str, Any]) -> str:
    """Return how a recipe is called."""
    return str(config["recipes"][recipe]["label"] if recipe in config["recipes"] else recipe.replace("_", " "))


def figure(summary: dict[str, Any], config: dict[str, Any]) -> Figure:
    """Draw each testbed: all settings as dots, the front of each recipe as a line, its spread over seeds as bars."""
    testbeds = summary["testbeds"]
    drawing = Figure(figsize=(6 * len(testbeds), 5), dpi=150, layout="constrained")
    names = list(dict.fromkeys(recipe for each in testbeds.values() for recipe in recipes_in(each["rows"])))
    for axes, (name, testbed) in zip(
        drawing.subplots(1, len(testbeds), squeeze=False)[0], testbeds.items(), strict=True
    ):
        for recipe in recipes_in(testbed["rows"]):
            rows = [row for row in testbed["rows"] if row["recipe"] == recipe]
            colour, front = f"C{names.index(recipe)}", front_of(rows, testbed["higher_is_better"])
            xs, ys = [row["macs_per_sample"] / 1e9 for row in rows], [row["mean"] for row in rows]
            axes.scatter(xs, ys, s=8, color=colour, alpha=0.35)
            axes.errorbar(
                [row["macs_per_sample"] / 1e9 for row in front],
                [row["mean"] for row in front],
                yerr=[row["std"] or 0.0 for row in front],
                color=colour, marker="o", markersize=4, capsize=2, linewidth=1.3, label=label_of(recipe, config),
            )  # fmt: skip
        if "paper_at_l_max" in testbed:
            mark = testbed["paper_at_l_max"]
            axes.scatter([mark["macs_per_sample"] / 1e9], [mark["mean"]], marker="*", s=180, color="black", zorder=4)
        axes.set(title=name, xscale="log", xlabel="10⁹ multiply–accumulates per sample")
        direction = "higher" if testbed["higher_is_better"] else "lower"
        axes.set_ylabel(f"{testbed['metric']} ({direction} is better); star: the paper's recipe at L_max")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return drawing


def page(name: str, testbed: dict[str, Any], config: dict[str, Any]) -> str:
    """Write a testbed's verdict, and the front of every recipe, as Markdown."""
    ratio, equal = testbed["compute_ratio_at_equal_quality"], testbed["quality_at_equal_compute"]
    lines = [f"## {name}", "", f"{testbed['num_samples']} samples for each seed; metric {testbed['metric']}. "]
    if "paper_at_l_max" in testbed:
        mark = testbed["paper_at_l_max"]
        reached = "no setting of ours is as good" if ratio is None else f"ours needs {ratio:.2f} of its compute"
        paper, ours = (f"{value:.4g}" if value is not None else "nothing" for value in equal.values())
        lines[-1] += (
            f"The paper's recipe at L_max has {mark['mean']:.4g}: for as much {reached}. At equal compute the recipe "
            f"reaches {paper} and ours {ours}. Settings were chosen by these very scores: the best of many is a little "
            "lucky."
        )
    cells = [
        (
            label_of(row["recipe"], config),
            in_words(row["setting"]["loops"], row["setting"])
            if "steps" in row["setting"]
            else f"loops {row['mean_loops']}",
            f"{row['mean_loops']:.3g}",
            f"{row['macs_per_sample'] / 1e9:.4g}",
            f"{row['mean']:.4g}" + (f" ± {row['std']:.2g}" if row["std"] is not None else ""),
            ", ".join(map(str, row["seeds"])),
        )
        for recipe in recipes_in(testbed["rows"])
        for row in front_of([row for row in testbed["rows"] if row["recipe"] == recipe], testbed["higher_is_better"])
    ]
    headings = ("recipe", "setting", "mean loops", "GMACs per sample", testbed["metric"], "seeds")
    return "\n".join([*lines, "", markdown_table(headings, cells), ""])


if __name__ == "__main__":
    sys.exit(status_of(main, "any_time"))

"""`make fig4` and its like: a figure of the paper from what was measured here, and the CSV behind it.

Figures 4, 5, 7, 8 and 13 read ``<measured>/<model>/test*/loops.json``, and of other ways of training than ILSD
``<measured>/<mode>/<model>/test*/loops.json``; at small scale they read ``<measured>/ablation*/ablation.json``:
Latin squares and sudokus, and moving digits for clips.
Figure 6 reads the TensorBoard files of ``<measured>/<model>``. Figure 14 reads ``update_norms.csv``, Figure 1 draws
samples of two checkpoints. The paper's points are marked as such in the legend.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from elt_lightning.commands.arguments import device_of
from elt_lightning.evaluation.drawing import load
from elt_lightning.evaluation.pictures import loops_figure, write_figure
from elt_lightning.files import written_aside
from elt_lightning.reproduce.curves import read_curves
from elt_lightning.reproduce.published import FIGURE_4, FIGURE_6, FIGURE_7, TABLE_1, TABLE_2
from elt_lightning.reproduce.sweeps import difference, drawn_alike, read_sweep, rows_of
from elt_lightning.reproduce.update_norms import figure as norms_figure

SMALL_SCALE = "small-scale twin, on data that the project makes"

ABLATIONS = {
    "ablation": "masked",
    "ablation_terms": "masked, shorter runs",
    "ablation_diffusion": "diffusion",
    "ablation_video": "video",
    "ablation_sudoku": "masked, sudoku",
}
"""Folders of results at small scale, and the family that each is of."""

FAMILIES = {1: "masked", 2: "diffusion", 4: "video"}
"""Of the models of each table."""

TITLES = {
    1: "samples per loop count, ILSD and vanilla looping",
    4: "quality against compute",
    5: "best quality for each parameter budget",
    6: "convergence",
    7: "quality per loop count, beyond those of training",
    8: "quality per loop count, with and without ILSD",
    13: "terms of the loss",
    14: "update of each loop by sampling step",
}

MODES = {
    "ilsd": "ILSD",
    "vanilla": "vanilla looping",
    "ground_truth": "ground truth only",
    "distillation": "distillation only",
    "deep_supervision": "deep supervision",
}
"""Ways of training, as the config's ``model.distillation.mode`` and as the legend have them."""

COMPARED = ("elt_l_8n3l", "elt_8n4l")
"""The models that are trained in several ways; which ones the paper's figures show we do not know."""

CONVERGENCE_METRICS = ("fid", "fvd", "valid_squares", "loss")
"""What Figure 6 follows: the first of these that a run logged in validation."""


@dataclass(frozen=True)
class Sources:
    """What a figure is drawn of."""

    measured: Path  # folder of runs, or of ablation*/ablation.json at small scale
    ilsd: Path = Path("none")  # Figure 1's checkpoint trained with ILSD
    vanilla: Path = Path("none")  # Figure 1's checkpoint trained by vanilla looping
    tokenizer_path: str | None = None  # of these, if the tokenizer's file has moved
    num: int = 8  # Figure 1's samples in a row
    norms: Path = Path("none")  # Figure 14's ``update_norms.csv``
    small_scale: bool = False  # small models, of the ablations: titles are marked


COLUMNS = (
    "source",  # "measured", or "paper"
    "family",  # "masked", "diffusion" or "video", at small scale a value of ABLATIONS; with the metric it is a panel
    "metric",
    "higher_is_better",
    "series",  # the line that the point is of
    "mode",  # of training, a key of MODES
    "train_loops",  # L_max, 1 for unlooped models
    "value",  # of the metric, a mean where there is a spread
    "spread",  # standard deviation over repeats or seeds
    "is_compared",  # whether all that sets its run apart from ILSD's is the way of training
    "loops",
    "step",  # of the optimiser
    "params",  # of the shared backbone; the paper's own count in its points
    "gmacs_per_sample",  # 10⁹ multiply–accumulates of drawing a sample
)
"""Columns of a table of points: a row is a point of a figure and of the CSV behind it."""


def points_of(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Lay points out as a table with all of :data:`COLUMNS`."""
    return pd.DataFrame(lines, columns=list(COLUMNS))


def goodness(points: pd.DataFrame) -> pd.Series:
    """Return what orders points from the best on: the smallest is best."""
    return points["value"].where(points["higher_is_better"] != True, -points["value"])  # noqa: E712


def best_first(points: pd.DataFrame) -> pd.DataFrame:
    """Order points from the best on."""
    return points.assign(order=goodness(points)).sort_values("order", kind="stable").drop(columns="order")


def cost_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return loop count and costs of a row of ``loops.json``."""
    gmacs = row["macs_per_sample"] / 1e9
    return {"loops": row["loops"], "params": row["params_backbone"], "gmacs_per_sample": gmacs}


def read_runs(folder: Path, mode: str = "ilsd") -> pd.DataFrame:
    """Read the runs of the paper's models below a folder: of each loop count the best guidance, in the primary metric.

    What is no model of the paper, or differs from it, is left out and named.
    """
    lines: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*/test*/loops.json")):
        report, model = read_sweep(path), path.parents[1].name
        papers = rows_of(model)
        reason = difference(report, papers, mode)
        if not papers or reason is not None:
            print(f"{path} is left out: {reason if papers else f'{model} is no model of Tables 1, 2 and 4'}")
            continue
        metric = report["primary_metric"]
        name = [model, *([MODES[mode]] if report["train_loops"] > 1 else [])]
        name += [path.parent.name] if path.parent.name != "test" else []  # several sweeps are separate lines
        of_run = {
            "source": "measured",
            "family": FAMILIES[papers[0].table],
            "metric": metric,
            "higher_is_better": report["higher_is_better"],
            "series": ", ".join(name),
            "mode": mode,
            "train_loops": report["train_loops"],
            "is_compared": model in COMPARED,
        }
        for row in drawn_alike(report, papers):
            score = row["metrics"][metric]
            lines.append(of_run | cost_of(row) | {"value": score["mean"], "spread": score["std"]})
    return best_first(points_of(lines)).drop_duplicates(["series", "loops"]).sort_index()


def read_ablations(folder: Path) -> pd.DataFrame:
    """Read the results of `make ablation` and its like that are there: mean and deviation over seeds."""
    lines = []
    for name_of_folder, family in ABLATIONS.items():
        path = folder / name_of_folder / "ablation.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text())
        metric, arms = summary["primary_metric"], summary["config"]["arms"]
        for name, arm in summary["arms"].items():
            of_arm = {
                "source": "measured",
                "family": family,
                "metric": metric,
                "higher_is_better": summary["higher_is_better"],
                "series": arm["label"],
                "mode": arms[name]["mode"],
                "train_loops": arms[name]["max_loops"],
                "is_compared": setup_of(arms[name]) == setup_of(arms["ilsd"]),
            }
            for row in arm["rows"]:
                seeds = pd.Series(row["metrics"][metric])
                lines.append(of_arm | cost_of(row) | {"value": seeds.mean(), "spread": seeds.std()})
    return points_of(lines)


def setup_of(arm: dict[str, Any]) -> tuple[Any, ...]:
    """Return what an arm of an ablation trains: network, loops, its own settings."""
    return arm["num_layers"], arm["max_loops"], arm.get("settings")


def read_points(sources: Sources, modes: Sequence[str] = ("ilsd",)) -> pd.DataFrame:
    """Read what was measured of some ways of training; unlooped models always come with it."""
    if sources.small_scale:
        points = read_ablations(sources.measured)
        return points[points["mode"].isin(modes) | (points["train_loops"] == 1)]
    others = [read_runs(sources.measured / mode, mode) for mode in modes if mode != "ilsd"]
    return pd.concat([read_runs(sources.measured), *others], ignore_index=True)


def of_the_paper(series: str, value: float, **places: Any) -> dict[str, Any]:
    """Return a point of a published FID."""
    paper = {"source": "paper", "family": "masked", "metric": "fid", "higher_is_better": False, "mode": "ilsd"}
    return paper | {"series": f"paper, {series}", "train_loops": 1, "value": value, "is_compared": False} | places


def with_paper(points: pd.DataFrame, sources: Sources, paper: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Put the paper's points behind ours, but at small scale."""
    return points if sources.small_scale else pd.concat([points, points_of(paper)], ignore_index=True)


def pareto_points(sources: Sources) -> pd.DataFrame:
    """Return Figure 4: quality against compute, beside the paper's fit (second-hand)."""
    fit = [10 ** (2 + 0.1 * place) for place in range(21)]
    name = "second-hand fit, compute as the paper counts it"
    paper = [of_the_paper(name, FIGURE_4.fid(gflops), gmacs_per_sample=gflops) for gflops in fit]
    return with_paper(read_points(sources), sources, paper)


def budget_points(sources: Sources) -> pd.DataFrame:
    """Return Figure 5: each model at its best loop count, in order of parameters, beside Tables 1 and 2."""
    best = best_first(read_points(sources)).drop_duplicates(["family", "metric", "series"])
    best["series"] = ["looped" if loops > 1 else "unlooped" for loops in best["train_loops"]]
    paper = [
        of_the_paper(f"Table {row.table}", row.fid.value, family=family, params=row.params.value, loops=row.loops)
        for family, rows in (("masked", TABLE_1), ("diffusion", TABLE_2))
        for row in rows
        if row.fid is not None
    ]
    return with_paper(best, sources, paper).sort_values("params", kind="stable")


def convergence_points(sources: Sources) -> pd.DataFrame:
    """Return Figure 6: validation over training, each model at its largest loop count."""
    models = ("unlooped", "ilsd") if sources.small_scale else ("dit_32", *FIGURE_6)
    lines = []
    for model in models:
        if not list((sources.measured / model).glob("events.out.tfevents.*")):
            continue
        logged: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for name, curve in read_curves(sources.measured / model).items():
            if parts := re.fullmatch(r"val/(\w+)@L(\d+)", name):
                logged.setdefault(parts[1], {})[int(parts[2])] = curve
        metric = next((m for start in CONVERGENCE_METRICS for m in logged if m.startswith(start)), None)
        if metric is None:
            continue
        loops, curve = max(logged[metric].items())
        of_run = {
            "source": "measured",
            "family": "masked" if sources.small_scale else "diffusion",
            "metric": metric,
            "higher_is_better": metric.startswith("valid"),
            "series": f"{model} (paper: {FIGURE_6[model].text} sooner)" if model in FIGURE_6 else model,
            "mode": "ilsd",
            "train_loops": loops,
            "loops": loops,
            "is_compared": False,
        }
        lines += [of_run | {"step": step, "value": value} for step, value in curve]
    return points_of(lines)


def clip_points(sources: Sources) -> pd.DataFrame:
    """Return Figure 7: one model at every loop count, beyond those of training too."""
    points = read_points(sources)
    best = {"family": "video", "metric": "fvd", "loops": FIGURE_7.loops, "train_loops": FIGURE_7.train_loops}
    measured = points[(points["train_loops"] > 1) & (points["family"] == "video")]
    return with_paper(measured, sources, [of_the_paper("best", FIGURE_7.fvd.value, **best)])


def looped_points(*modes: str) -> Callable[[Sources], pd.DataFrame]:
    """Return Figures 8 and 13: quality per loop count for some ways of training."""

    def read(sources: Sources) -> pd.DataFrame:
        points = read_points(sources, modes)
        points = points[(points["train_loops"] > 1) & (points["is_compared"] == True)]  # noqa: E712
        # Where one way alone was trained there is nothing to compare; at full size the others are still to come.
        ways = points.groupby("family")["mode"].transform("nunique")
        return points[ways > 1] if sources.small_scale else points

    return read


@dataclass(frozen=True)
class Axis:
    """What a figure of points has across."""

    name: str  # of a column of points
    label: str  # for readers
    logarithmic: bool = False  # its scale


LOOPS = Axis("loops", "loops at inference (dashed: the loop count of training)")
POINTS: dict[int, tuple[Axis, Callable[[Sources], pd.DataFrame]]] = {
    4: (Axis("gmacs_per_sample", "compute per sample (10⁹ multiply–accumulates)", True), pareto_points),
    5: (Axis("params", "parameters", True), budget_points),
    6: (Axis("step", "optimiser step"), convergence_points),
    7: (LOOPS, clip_points),
    8: (LOOPS, looped_points("ilsd", "vanilla")),
    13: (LOOPS, looped_points(*MODES)),
}
"""Of each figure of points: what it has across, and where its points are from."""


def draw(points: pd.DataFrame, axis: Axis, title: str) -> Figure:
    """Draw a panel for each family and metric, in it a line for each series."""
    panels = list(points.groupby(["family", "metric"]))
    drawing = Figure(figsize=(6 * max(1, len(panels)), 4.4), dpi=120)
    all_axes = drawing.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for ((family, _), here), axes in zip(panels, all_axes, strict=False):
        draw_panel(axes, here, axis)
        axes.set_title(family, fontsize=9)
    if not (points["source"] == "measured").any():
        all_axes[0].text(
            0.5, 0.9, "nothing measured yet", ha="center", color="tab:red", transform=all_axes[0].transAxes
        )
    drawing.suptitle(title, fontsize=11)
    drawing.tight_layout()
    return drawing


def draw_panel(axes: Axes, points: pd.DataFrame, axis: Axis) -> None:
    """Draw the lines of one panel; over compute also the front of what was measured."""
    for name, line in points.groupby("series", sort=False):
        of_paper = line["source"].iloc[0] == "paper"
        style = {"linestyle": "--", "color": "gray"} if of_paper else {"marker": "o", "markersize": 4}
        if of_paper and axis.name != "gmacs_per_sample":
            style |= {"marker": "*", "linestyle": "none", "markersize": 9}
        across, values, errors = (line[column].astype(float) for column in (axis.name, "value", "spread"))
        axes.errorbar(across, values, yerr=errors.replace(0, math.nan), capsize=3, label=name, **style)
    if axis is LOOPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for loops in set(points["train_loops"]):
            axes.axvline(loops, color="black", linestyle="--", linewidth=0.5, alpha=0.3)
    front = pareto_front(points[points["source"] == "measured"])
    if len(front) and axis.name == "gmacs_per_sample":
        places = front["gmacs_per_sample"]
        axes.plot(places, front["value"], color="black", linewidth=4, alpha=0.15, label="front")
    if axis.logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(axis.label)
    first = points.iloc[0]
    axes.set_ylabel(f"{first['metric']} ({'higher' if first['higher_is_better'] else 'lower'} is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points that are better than all that cost no more, in order of compute."""
    by_cost = best_first(points).sort_values("gmacs_per_sample", kind="stable")
    order = goodness(by_cost)
    return by_cost[order < order.cummin().shift(fill_value=math.inf)]


def draw_samples(sources: Sources) -> tuple[Figure, pd.DataFrame]:
    """Draw Figure 1: the same classes and seeds from two checkpoints, from L_max/4 to 5/4·L_max."""
    rows: dict[str, Tensor] = {}
    lines = []
    for label, path in (("ILSD", sources.ilsd), ("vanilla", sources.vanilla)):
        model = load(path, tokenizer_path=sources.tokenizer_path).to(device_of(None))
        labels, most = model.labels(None, sources.num), model.module.max_loops
        for loops in sorted({max(1, most * quarter // 4) for quarter in range(1, 6)}):
            rows[f"{label}, L = {loops}"] = model.shown(model.codes(labels, loops, model.module.sampler))
            lines.append({"row": label, "loops": loops, "train_loops": most, "seed": 0, "checkpoint": path})
    return loops_figure(rows), pd.DataFrame(lines)


def draw_norms(sources: Sources) -> tuple[Figure, pd.DataFrame]:
    """Draw Figure 14: what `update_norms` measured, at the loop count of training."""
    lines = pd.read_csv(sources.norms)
    loops = int(lines["loop"].max())
    norms = torch.tensor(lines["update_norm"].to_numpy()).view(-1, loops)
    return norms_figure(norms, train_loops=loops), lines


def render(number: int, sources: Sources) -> tuple[Figure, pd.DataFrame]:
    """Make a figure and the lines of its CSV; where nothing was measured the figure states that."""
    title = f"Figure {number}, {SMALL_SCALE}" if sources.small_scale else f"Figure {number}"
    title += f": {TITLES[number]}"
    title += ", of masked models in place of diffusion" if sources.small_scale and number in (1, 6) else ""
    needed = {1: (sources.ilsd, sources.vanilla), 14: (sources.norms,)}.get(number, ())
    if any(not path.is_file() for path in needed):
        return draw(points_of([]), LOOPS, title), pd.DataFrame({"missing": needed})
    if number in POINTS:
        axis, read = POINTS[number]
        points = read(sources)
        return draw(points, axis, title), points
    drawing, lines = draw_samples(sources) if number == 1 else draw_norms(sources)
    drawing.suptitle(title, fontsize=9, y=0.93 if number == 1 else 1.0)
    return drawing, lines


def write(number: int, sources: Sources, folder: Path) -> None:
    """Write ``fig<number>.png`` and ``fig<number>.csv``."""
    drawing, lines = render(number, sources)
    stem = folder / f"fig{number}"
    write_figure(stem.with_suffix(".png"), drawing)
    with written_aside(stem.with_suffix(".csv")) as aside:
        lines.convert_dtypes().to_csv(aside, index=False)
    print(stem.with_suffix(".png"))

"""`make fig4` and its like: a figure of the paper from what was measured here, and the CSV behind it.

python -m elt_lightning.reproduce.figures 8 --measured runs/imagenet256 --output docs/results/figures

Figures 4, 5, 7, 8 and 13 read ``<measured>/<model>/test*/loops.json``, and of other ways of training than ILSD
``<measured>/<mode>/<model>/test*/loops.json``; with ``--small_scale`` they read ``<measured>/ablation*/ablation.json``:
Latin squares and sudokus, and moving digits for clips.
Figure 6 reads the TensorBoard files of ``<measured>/<model>``. Figure 14 reads ``update_norms.csv``, Figure 1 draws
samples of two checkpoints. Only what is marked so in the legend is the paper's.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import status_of
from elt_lightning.commands.arguments import device_of
from elt_lightning.evaluation.report import loops_figure
from elt_lightning.files import written_aside
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.reproduce.curves import read_curves
from elt_lightning.reproduce.published import FIGURE_4, FIGURE_6, FIGURE_7, TABLE_1, TABLE_2
from elt_lightning.reproduce.sweeps import difference, read_sweep, rows_of
from elt_lightning.reproduce.update_norms import figure as norms_figure
from elt_lightning.tokenizers.loading import load_tokenizer

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
class Point:
    """A point of a figure, and a line of the CSV behind it.

    Attributes:
        source: "measured", or "paper".
        family: "masked", "diffusion" or "video", at small scale a value of :data:`ABLATIONS`; with the metric it
            decides the panel.
        metric: its name.
        higher_is_better: its direction.
        series: the line that the point is of.
        mode: way of training, a key of :data:`MODES`.
        train_loops: L_max, 1 for unlooped models.
        value: of the metric, a mean where there is a spread; not a number until something was measured.
        spread: standard deviation over repeats or seeds.
        is_compared: whether all that sets its run apart from ILSD's is the way of training.
        loops: L.
        step: optimiser step.
        params: of the shared backbone; the paper's own count in its points.
        gmacs_per_sample: 10⁹ multiply–accumulates of drawing a sample.
    """

    source: str
    family: str
    metric: str
    higher_is_better: bool
    series: str
    mode: str
    train_loops: int
    value: float = math.nan
    spread: float | None = None
    is_compared: bool = False
    loops: int | None = None
    step: int | None = None
    params: float | None = None
    gmacs_per_sample: float | None = None

    def at(self, row: dict[str, Any], mean: float, std: float | None) -> "Point":
        """Put a value in, measured at the loop count and cost of a row of ``loops.json``."""
        cost = row["macs_per_sample"] / 1e9
        return replace(
            self, value=mean, spread=std, loops=row["loops"], params=row["params_backbone"], gmacs_per_sample=cost
        )


def read_runs(folder: Path, mode: str = "ilsd") -> list[Point]:
    """Read the runs of the paper's models below a folder: of each loop count the best guidance, in the primary metric.

    What is no model of the paper, or differs from it, is left out and named.
    """
    points = []
    for path in sorted(folder.glob("*/test*/loops.json")):
        report, model = read_sweep(path), path.parents[1].name
        papers = rows_of(model)
        reason = difference(report, papers, mode)
        if not papers or reason is not None:
            print(f"{path} is left out: {reason if papers else f'{model} is no model of Tables 1, 2 and 4'}")
            continue
        metric = report["primary_metric"]
        name = [model, *([MODES[mode]] if report["train_loops"] > 1 else [])]
        name += [path.parent.name] if path.parent.name != "test" else []  # of several sweeps each is a line of its own
        of_run = Point(
            source="measured",
            family=FAMILIES[papers[0].table],
            metric=metric,
            higher_is_better=report["higher_is_better"],
            series=", ".join(name),
            mode=mode,
            train_loops=report["train_loops"],
            is_compared=model in COMPARED,
        )
        rows = [of_run.at(row, **row["metrics"][metric]) for row in report["rows"]]
        best: dict[Any, Point] = {point.loops: point for point in sorted(rows, key=goodness, reverse=True)}
        points += [best[loops] for loops in sorted(best)]
    return points


def read_ablations(folder: Path) -> list[Point]:
    """Read the results of `make ablation` and its like that are there: mean and deviation over seeds."""
    points = []
    for name_of_folder, family in ABLATIONS.items():
        path = folder / name_of_folder / "ablation.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text())
        metric, arms = summary["primary_metric"], summary["config"]["arms"]
        for name, arm in summary["arms"].items():
            of_arm = Point(
                source="measured",
                family=family,
                metric=metric,
                higher_is_better=summary["higher_is_better"],
                series=arm["label"],
                mode=arms[name]["mode"],
                train_loops=arms[name]["max_loops"],
                is_compared=setup_of(arms[name]) == setup_of(arms["ilsd"]),
            )
            for row in arm["rows"]:
                seeds = row["metrics"][metric]
                points.append(of_arm.at(row, mean(seeds), stdev(seeds) if len(seeds) > 1 else None))
    return points


def setup_of(arm: dict[str, Any]) -> tuple[Any, ...]:
    """Give what an arm of an ablation trains: network, loops, settings of its own."""
    return arm["num_layers"], arm["max_loops"], arm.get("settings")


def read_points(options: argparse.Namespace, modes: Sequence[str] = ("ilsd",)) -> list[Point]:
    """Read what was measured of some ways of training; unlooped models always come with it."""
    if options.small_scale:
        return [point for point in read_ablations(options.measured) if point.mode in modes or point.train_loops == 1]
    others = [point for mode in modes if mode != "ilsd" for point in read_runs(options.measured / mode, mode)]
    return read_runs(options.measured) + others


def goodness(point: Point) -> float:
    """Order points from the best on."""
    return -point.value if point.higher_is_better else point.value


def of_the_paper(series: str, value: float, **places: Any) -> Point:
    """Make a point of a published FID."""
    return Point("paper", places.pop("family", "masked"), "fid", False, f"paper, {series}", "ilsd", 1, value, **places)


def pareto_points(options: argparse.Namespace) -> list[Point]:
    """Figure 4: quality against compute, beside the paper's fit (second-hand)."""
    fit = [10 ** (2 + 0.1 * place) for place in range(21)]
    name = "second-hand fit, compute as the paper counts it"
    paper = [of_the_paper(name, FIGURE_4.fid(gflops), gmacs_per_sample=gflops) for gflops in fit]
    return read_points(options) + ([] if options.small_scale else paper)


def budget_points(options: argparse.Namespace) -> list[Point]:
    """Figure 5: each model at its best loop count, in order of parameters, beside Tables 1 and 2."""
    best: dict[tuple[str, str, str], Point] = {}
    for point in sorted(read_points(options), key=goodness):
        looped = "looped" if point.train_loops > 1 else "unlooped"
        best.setdefault((point.family, point.metric, point.series), replace(point, series=looped))
    paper = [
        of_the_paper(f"Table {row.table}", row.fid.value, family=family, params=row.params.value, loops=row.loops)
        for family, rows in (("masked", TABLE_1), ("diffusion", TABLE_2))
        for row in rows
        if row.fid is not None
    ]
    points = [*best.values(), *([] if options.small_scale else paper)]
    return sorted(points, key=lambda point: point.params or 0)


def convergence_points(options: argparse.Namespace) -> list[Point]:
    """Figure 6: validation over training, each model at its largest loop count."""
    models = ("unlooped", "ilsd") if options.small_scale else ("dit_32", *FIGURE_6)
    points = []
    for model in models:
        if not list((options.measured / model).glob("events.out.tfevents.*")):
            continue
        logged: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for name, curve in read_curves(options.measured / model).items():
            if parts := re.fullmatch(r"val/(\w+)@L(\d+)", name):
                logged.setdefault(parts[1], {})[int(parts[2])] = curve
        metric = next((m for start in CONVERGENCE_METRICS for m in logged if m.startswith(start)), None)
        if metric is None:
            continue
        loops, curve = max(logged[metric].items())
        series = f"{model} (paper: {FIGURE_6[model].text} sooner)" if model in FIGURE_6 else model
        family, upwards = "masked" if options.small_scale else "diffusion", metric.startswith("valid")
        of_run = Point("measured", family, metric, upwards, series, "ilsd", loops, loops=loops)
        points += [replace(of_run, step=step, value=value) for step, value in curve]
    return points


def clip_points(options: argparse.Namespace) -> list[Point]:
    """Figure 7: one model at every loop count, beyond those of training too."""
    measured = [point for point in read_points(options) if point.train_loops > 1 and point.family == "video"]
    best = of_the_paper("best", FIGURE_7.fvd.value, family="video", loops=FIGURE_7.loops)
    return measured + ([] if options.small_scale else [replace(best, metric="fvd", train_loops=FIGURE_7.train_loops)])


def looped_points(*modes: str) -> Callable[[argparse.Namespace], list[Point]]:
    """Figures 8 and 13: quality per loop count for some ways of training."""

    def read(options: argparse.Namespace) -> list[Point]:
        points = [point for point in read_points(options, modes) if point.train_loops > 1 and point.is_compared]
        # Where one way alone was trained there is nothing to compare; at full size the others are still to come.
        ways = {family: {p.mode for p in points if p.family == family} for family in {p.family for p in points}}
        return [point for point in points if not options.small_scale or len(ways[point.family]) > 1]

    return read


@dataclass(frozen=True)
class Axis:
    """What a figure of points has across.

    Attributes:
        name: of the attribute of :class:`Point`.
        label: for readers.
        logarithmic: its scale.
    """

    name: str
    label: str
    logarithmic: bool = False


LOOPS = Axis("loops", "loops at inference (dashed: the loop count of training)")
POINTS: dict[int, tuple[Axis, Callable[[argparse.Namespace], list[Point]]]] = {
    4: (Axis("gmacs_per_sample", "compute per sample (10⁹ multiply–accumulates)", True), pareto_points),
    5: (Axis("params", "parameters", True), budget_points),
    6: (Axis("step", "optimiser step"), convergence_points),
    7: (LOOPS, clip_points),
    8: (LOOPS, looped_points("ilsd", "vanilla")),
    13: (LOOPS, looped_points(*MODES)),
}
"""Of each figure of points: what it has across, and where its points are from."""


def draw(points: Sequence[Point], axis: Axis, title: str) -> Figure:
    """Draw a panel for each family and metric, in it a line for each series."""
    panels = sorted({(point.family, point.metric) for point in points})
    drawing = Figure(figsize=(6 * max(1, len(panels)), 4.4), dpi=120)
    all_axes = drawing.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for panel, axes in zip(panels, all_axes, strict=False):
        here = [point for point in points if (point.family, point.metric) == panel]
        draw_panel(axes, here, axis)
        axes.set_title(panel[0], fontsize=9)
    if not any(point.source == "measured" for point in points):
        all_axes[0].text(
            0.5, 0.9, "nothing measured yet", ha="center", color="tab:red", transform=all_axes[0].transAxes
        )
    drawing.suptitle(title, fontsize=11)
    drawing.tight_layout()
    return drawing


def draw_panel(axes: Axes, points: Sequence[Point], axis: Axis) -> None:
    """Draw the lines of one panel; over compute also the front of what was measured."""
    for name in dict.fromkeys(point.series for point in points):
        line = [point for point in points if point.series == name]
        across = [getattr(point, axis.name) for point in line]
        style = {"linestyle": "--", "color": "gray"} if line[0].source == "paper" else {"marker": "o", "markersize": 4}
        if line[0].source == "paper" and axis.name != "gmacs_per_sample":
            style |= {"marker": "*", "linestyle": "none", "markersize": 9}
        errors = [point.spread or math.nan for point in line]
        axes.errorbar(across, [point.value for point in line], yerr=errors, capsize=3, label=name, **style)
    if axis is LOOPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for loops in {point.train_loops for point in points}:
            axes.axvline(loops, color="black", linestyle="--", linewidth=0.5, alpha=0.3)
    front = pareto_front([point for point in points if point.source == "measured"])
    if front and axis.name == "gmacs_per_sample":
        places = [point.gmacs_per_sample or math.nan for point in front]
        axes.plot(places, [point.value for point in front], color="black", linewidth=4, alpha=0.15, label="front")
    if axis.logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(axis.label)
    axes.set_ylabel(f"{points[0].metric} ({'higher' if points[0].higher_is_better else 'lower'} is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Give the points that are better than all that cost no more, in order of compute."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.gmacs_per_sample or 0, goodness(point))):
        if not front or goodness(point) < goodness(front[-1]):
            front.append(point)
    return front


def draw_samples(options: argparse.Namespace) -> tuple[Figure, list[dict[str, Any]]]:
    """Figure 1: the same classes and seeds from two checkpoints, from a quarter of L_max to a quarter beyond it."""
    rows: dict[str, Tensor] = {}
    lines = []
    for label, path in (("ILSD", options.ilsd), ("vanilla", options.vanilla)):
        checkpoint = read_checkpoint(path)
        module = build_module(checkpoint).to(device_of(None))
        tokenizer = load_tokenizer(checkpoint["elt"]["tokenizer"], options.tokenizer_path).to(module.device)
        index = torch.arange(options.num, device=module.device)
        for loops in sorted({max(1, module.max_loops * quarter // 4) for quarter in range(1, 6)}):
            codes = module.sample(index % module.num_classes, loops, sample_seeds(0, index))
            rows[f"{label}, L = {loops}"] = tokenizer.present(tokenizer.decode(codes)).cpu()
            lines.append({"row": label, "loops": loops, "train_loops": module.max_loops, "seed": 0, "checkpoint": path})
    return loops_figure(rows), lines


def draw_norms(options: argparse.Namespace) -> tuple[Figure, list[dict[str, Any]]]:
    """Figure 14: what `update_norms` measured, at the loop count of training."""
    with options.norms.open(newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    loops = max(int(line["loop"]) for line in lines)
    norms = torch.tensor([float(line["update_norm"]) for line in lines]).view(-1, loops)
    return norms_figure(norms, train_loops=loops), lines


def render(options: argparse.Namespace) -> tuple[Figure, list[dict[str, Any]]]:
    """Make a figure and the lines of its CSV; where nothing was measured the figure says so."""
    title = f"Figure {options.number}, {SMALL_SCALE}" if options.small_scale else f"Figure {options.number}"
    title += f": {TITLES[options.number]}"
    title += ", of masked models in place of diffusion" if options.small_scale and options.number in (1, 6) else ""
    needed = {1: (options.ilsd, options.vanilla), 14: (options.norms,)}.get(options.number, ())
    if any(path is None or not path.is_file() for path in needed):
        return draw([], LOOPS, title), [{"missing": path} for path in needed]
    if options.number in POINTS:
        axis, read = POINTS[options.number]
        points = read(options)
        drawing = draw(points, axis, title)
        return drawing, [asdict(point) for point in points] or [dict.fromkeys(field.name for field in fields(Point))]
    drawing, lines = draw_samples(options) if options.number == 1 else draw_norms(options)
    drawing.suptitle(title, fontsize=9, y=0.93 if options.number == 1 else 1.0)
    return drawing, lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``fig<number>.png`` and ``fig<number>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("number", type=int, choices=sorted([*POINTS, 1, 14]), help="of the figure")
    parser.add_argument("--measured", type=Path, help="folder of runs, or of ablation*/ablation.json at small scale")
    parser.add_argument("--ilsd", type=Path, help="Figure 1: checkpoint trained with ILSD")
    parser.add_argument("--vanilla", type=Path, help="Figure 1: checkpoint trained by vanilla looping")
    parser.add_argument("--tokenizer_path", help="Figure 1: where the tokenizer's file lies, if it has moved")
    parser.add_argument("--num", type=int, default=8, help="Figure 1: samples in a row (default 8)")
    parser.add_argument("--norms", type=Path, help="Figure 14: update_norms.csv")
    parser.add_argument("--output", type=Path, default=Path("docs/results/figures"), help="folder of the results")
    parser.add_argument("--small_scale", action="store_true", help="small models, of the ablations: titles say so")
    options = parser.parse_args(arguments)
    default = "docs/results" if options.small_scale else "runs/ucf101" if options.number == 7 else "runs/imagenet256"
    options.measured = options.measured or Path(default)
    drawing, lines = render(options)
    stem = options.output / f"fig{options.number}"
    with written_aside(stem.with_suffix(".png")) as aside:
        drawing.savefig(aside, bbox_inches="tight")
    with written_aside(stem.with_suffix(".csv")) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(stem.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(status_of(main, "figures"))

"""Several sweeps on one sheet: quality against loops and against compute, with the spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elt_lightning.files import markdown_table, with_deviation

Across = Literal["loops", "compute", "steps"]
"""What scores are drawn and laid out over."""

AXES: dict[Across, str] = {
    "loops": "loops at inference (dashed: the loop count of training)",
    "compute": "compute of a sample (10⁹ multiply–accumulates)",
    "steps": "steps of training",
}


@dataclass(frozen=True)
class Curve:
    """What one model, or the seeds of one, scored over loop counts, or models alike over steps of training."""

    label: str
    scores: pd.DataFrame  # of one metric: a row for each loop count, or number of steps, a column for each seed
    macs: pd.Series  # {loops: multiply–accumulates of a sample}
    train_loops: int  # L_max; 1 is unlooped
    parameters: int  # of the looped stack


def sheet(curves: Sequence[Curve], metric: str, higher_is_better: bool) -> Figure:
    """Draw the curves twice: against loop counts, and against multiply–accumulates of a sample."""
    drawing = Figure(figsize=(13, 4.5), dpi=150)
    loops, compute = drawing.subplots(1, 2, sharey=True)
    draw(loops, curves)
    draw(compute, curves, "compute")
    loops.set_ylabel(f"{metric} ({'higher' if higher_is_better else 'lower'} is better)")
    return drawing


def draw(axes: Axes, curves: Sequence[Curve], across: Across = "loops") -> None:
    """Draw a line through the means of each curve, its seeds as dots; an unlooped model is a level, or a point."""
    for curve in curves:
        means = curve.scores.mean(axis=1)
        places = pd.Series(means.index, index=means.index) if across != "compute" else curve.macs / 1e9
        if curve.train_loops == 1 and len(means) == 1 and across != "compute":
            axes.axhline(means.iloc[0], color="gray", linestyle=":", linewidth=1)
            side, place = ("left", 0.01) if across == "steps" else ("right", 0.99)  # where curves are seldom as good
            axes.annotate(
                curve.label,
                (place, means.iloc[0]),
                xycoords=("axes fraction", "data"),
                ha=side,
                va="bottom",
                fontsize=7,
                color="gray",
            )
            continue
        (line,) = axes.plot(places[means.index], means, marker="o", label=curve.label)
        for seed in curve.scores:
            axes.plot(
                places[means.index],
                curve.scores[seed],
                marker=".",
                linestyle="none",
                color=line.get_color(),
                alpha=0.4,
            )
        if across == "loops":
            axes.axvline(curve.train_loops, color="black", linestyle="--", linewidth=0.5, alpha=0.3)
    axes.set_xlabel(AXES[across])
    if axes.get_legend_handles_labels()[0]:  # below: it would hide points
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axes.grid(alpha=0.3)


def table(curves: Sequence[Curve], metric: str, in_percent: bool, across: Across = "loops") -> str:
    """Lay the curves out in Markdown: a row for each, loops or steps across, mean ± standard deviation over seeds."""
    columns = sorted({place for curve in curves for place in curve.scores.index})
    scale, form = (100, ".1f") if in_percent else (1, ".3g")
    lines = []
    for curve in curves:
        cells = [
            with_deviation([scale * value for value in curve.scores.loc[place].dropna()], form)
            if place in curve.scores.index
            else ""
            for place in columns
        ]
        lines.append((curve.label, f"{curve.parameters:,}", *cells))
    over = [f"L = {place}" if across == "loops" else f"{place} steps" for place in columns]
    headings = (metric + (", %" if in_percent else ""), "backbone parameters", *over)
    return markdown_table(headings, lines) + "\n"

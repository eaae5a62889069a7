"""The best use of a compute budget: settings of the sampler tried on samples of their own, and what came of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from elt_lightning.errors import UserError
from elt_lightning.evaluation.pictures import write_figure
from elt_lightning.evaluation.report import in_words
from elt_lightning.files import write_json
from elt_lightning.samplers.base import Sampler

FIRST_SAMPLE = 1_001_000
"""Number of the first sample of a calibration: tests, which begin at 0, draw others, and of puzzles others are set."""

WEAK_EXITS = ("exit_scale", "weak_loops")


class Tried(NamedTuple):
    """A setting that was measured."""

    loops: int  # with a tolerance, the most
    settings: dict[str, Any]  # as `Sampler.settings` names them
    mean_loops: float  # over samples and sampling steps
    macs_per_sample: int
    score: float  # of the primary metric

    def as_dict(self, full: int) -> dict[str, Any]:
        """Return it as plain data, with its compute as a share of ``full`` multiply–accumulates."""
        costs = {"macs_per_sample": self.macs_per_sample, "compute": self.macs_per_sample / full}
        return {"loops": self.loops, **self.settings, "mean_loops": self.mean_loops, **costs, "score": self.score}


def pareto_front(tried: Iterable[Tried], higher_is_better: bool) -> list[Tried]:
    """Return the settings that no other is as cheap as and better, or as good as and cheaper; the cheapest first."""
    sign, front = 1 if higher_is_better else -1, list[Tried]()
    for each in sorted(tried, key=lambda each: (each.macs_per_sample, -sign * each.score)):
        if not math.isnan(each.score) and (not front or sign * each.score > sign * front[-1].score):
            front.append(each)
    return front


def search(
    sampler: Sampler,
    grid: Mapping[str, Sequence[Any]],
    measure: Callable[[int, Sampler], Tried],
    possible: Callable[[int, Sampler], bool],
    higher_is_better: bool,
    auto_loops: int,
) -> list[Tried]:
    """Try settings: every loop count with every number of steps first, then one further setting after the other.

    Each further setting takes all its values at every point of the front that was found before. That finds what a
    whole grid finds unless settings help only together, in a fraction of its time.

    Args:
        sampler: whose settings are changed; of a network that it suits.
        grid: {setting: values}, of "loops" and what :data:`SETTINGS` names.
        measure: of a loop count and a sampler.
        possible: whether a setting may be tried.
        higher_is_better: direction of the score.
        auto_loops: the most loops where a tolerance ends them.
    """
    tried: dict[tuple[Any, ...], Tried] = {}

    def attempt(loops: int, **changes: Any) -> None:
        changed = sampler.with_settings(**changes)
        key = (loops, *changed.settings().values())
        if key not in tried and possible(loops, changed):
            tried[key] = measure(loops, changed)

    for steps in grid["steps"]:
        for loops in grid["loops"]:
            attempt(loops, steps=steps)
    for names in (("carry_state",), ("guidance",), WEAK_EXITS, ("loop_schedule",), ("tolerance",), WEAK_EXITS):
        for point in pareto_front(tried.values(), higher_is_better):
            for values in product(*(grid[name] for name in names)):
                loops = auto_loops if names == ("tolerance",) else point.loops
                attempt(loops, **point.settings | dict(zip(names, values, strict=True)))
    return list(tried.values())


def write_plan(path: Path, description: dict[str, Any], tried: Sequence[Tried], full: Tried, budget: float) -> Tried:
    """Write ``plan.json`` with the best setting within the budget and the front, and ``pareto.png`` beside it.

    Args:
        path: of the plan.
        description: of the model and how it was measured; ``primary_metric`` and ``higher_is_better`` among it.
        tried: every setting that was measured.
        full: the full recipe, which the budget is a share of.
        budget: share of the full recipe's compute.

    Returns:
        the best setting.

    Raises:
        UserError: none lies within the budget.
    """
    front = pareto_front([full, *tried], description["higher_is_better"])
    within = [each for each in front if each.macs_per_sample <= budget * full.macs_per_sample]
    if not within:
        raise UserError(f"no setting that was tried costs less than {budget:g} of the full recipe: give smaller ones")
    best, macs = within[-1], full.macs_per_sample
    plan = description | {
        "budget": budget,
        "best": best.as_dict(macs),
        "full_recipe": full.as_dict(macs),
        "front": [each.as_dict(macs) for each in front],
        "tried": [each.as_dict(macs) for each in tried],
    }
    write_json(path, plan)
    write_figure(picture_beside(path), pareto_figure(plan))
    return best


def picture_beside(path: Path) -> Path:
    """Return where the picture of a plan goes."""
    return path.with_name("pareto.png")


def pareto_figure(plan: Mapping[str, Any]) -> Figure:
    """Draw all settings of a plan, their score against compute: by steps in colour, the front as a line."""
    figure = Figure(figsize=(8, 5), dpi=120)
    axes = figure.add_subplot()
    kinds = {"plain": "o", "exit guidance": "^", "tolerance": "s", "both": "D"}

    def kind(each: Mapping[str, Any]) -> str:
        has_exit, settles = bool(each["exit_scale"]), each["tolerance"] is not None
        return "both" if has_exit and settles else "exit guidance" if has_exit else "tolerance" if settles else "plain"

    for place, steps in enumerate(sorted({each["steps"] for each in plan["tried"]})):
        for name, marker in kinds.items():
            points = [each for each in plan["tried"] if each["steps"] == steps and kind(each) == name]
            if points:
                xs, ys = [each["compute"] for each in points], [each["score"] for each in points]
                axes.scatter(xs, ys, s=22, marker=marker, color=f"C{place}", alpha=0.6, label=f"{steps} steps, {name}")
    front = plan["front"]
    axes.plot([each["compute"] for each in front], [each["score"] for each in front], color="black", linewidth=1)
    full = plan["full_recipe"]
    axes.scatter([full["compute"]], [full["score"]], marker="*", s=160, color="red", label="full recipe", zorder=3)
    axes.axvline(plan["budget"], color="gray", linestyle="--", linewidth=1)
    axes.annotate("budget", (plan["budget"], 0.01), xycoords=("data", "axes fraction"), fontsize=8, rotation=90)
    best = plan["best"]
    label = in_words(best["loops"], best).replace(", ", "\n")
    axes.annotate(f"best\n{label}", (best["compute"], best["score"]), textcoords="offset points", xytext=(8, -8),
                  va="top", fontsize=7)  # fmt: skip
    axes.set_xlabel("compute per sample, share of the full recipe's")
    axes.set_ylabel(f"{plan['primary_metric']} ({'higher' if plan['higher_is_better'] else 'lower'} is better)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure

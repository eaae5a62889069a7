"""What `make any-time` measured, laid out: rows over seeds, what is compared, one figure and one page.

Ours is compared with the paper's recipe at equal quality and at equal compute. Since the best of many settings is a
little lucky, the comparison is made a second time for half of the compute, with settings that were chosen on the other
seeds' models.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elt_lightning.errors import UserError
from elt_lightning.evaluation.calibration import Tried, pareto_front
from elt_lightning.evaluation.report import in_words
from elt_lightning.files import markdown_table, write_json, write_text, written_aside
from elt_lightning.samplers.base import SETTINGS

Rows = Sequence[dict[str, Any]]

HALF = 0.5
"""The share of the recipe's compute that ours is to need for the same quality."""

SHOWN = 2.5
"""The figure ends at so many times the compute of the recipe at L_max."""

UNLOOPED = "unlooped models"

COLOURS = ("tab:blue", "tab:red", "tab:orange", "tab:green", "tab:gray")

EQUAL_COMPUTE = 1.05
"""What costs at most this many times as much costs the same: a weak exit's head is a few hundredths of a pass."""


def records_path(output: Path, testbed: str, recipe: str, seed: int) -> Path:
    """Return where the records of one checkpoint are."""
    return output / "runs" / f"{testbed}_{recipe}_seed{seed}.json"


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells one setting from another."""
    return (record["loops"], *(record[name] for name in SETTINGS))


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
        about = described(contents)
        primary_metric = about.pop("primary_metric")
        metric = testbed.get("metric", primary_metric)
        rows = list(recorded_rows(testbed.get("recorded", {}), output.parent, metric))
        for recipe in config["recipes"]:
            by_setting: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
            for (of, seed), content in contents.items():
                for record in content["records"] if of == recipe else ():
                    by_setting.setdefault(key_of(record), {})[seed] = record
            rows += [row_of(recipe, records, metric) for records in by_setting.values()]
        summary["testbeds"][name] = {"metric": metric} | about | {"rows": rows} | verdict(rows, config, about)
    return summary


KEPT = ("num_samples", "train_steps", "train_loops", "sampling_steps", "guidance", "primary_metric", "higher_is_better")
"""What records say of themselves beside their settings."""


def described(contents: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Return what all records of a testbed have in common, {(recipe, seed): records}.

    Raises:
        UserError: some were measured otherwise, and cannot be compared with the rest.
    """
    first = next(iter(contents.values()))
    for (recipe, seed), other in contents.items():
        if differing := [
            f"{name} {other[name]} in place of {first[name]}" for name in KEPT if other[name] != first[name]
        ]:
            raise UserError(f"the records of {recipe}, seed {seed}, have {', '.join(differing)}: measure them again")
    return {name: first[name] for name in KEPT}


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
        if missing := [arm for arm in arms if arm not in summary["arms"]]:
            print(f"not in {path}, and left out: {', '.join(missing)}")
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


def verdict(rows: Rows, config: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Compare ours with the paper's recipe, where it is measured at L_max with all its steps and nothing else.

    Returns:
        ``compute_ratio_at_equal_quality``: the compute of our cheapest setting that is as good, over the recipe's;
        None where none is. ``compute_ratio_of_the_recipe_itself``: the same of the recipe's own settings, such as
        fewer steps. ``quality_at_equal_compute``: the best that either reaches without more compute.
        ``paper_at_l_max``: the row they are compared with; only rows over the same seeds are. ``held_out``: see
        :func:`held_out`. ``worth``: {recipe: see :func:`worth`}.
    """
    sign = 1 if about["higher_is_better"] else -1
    paper = [row for row in rows if row["recipe"] == config["paper"]]
    mark = next((row for row in paper if is_plain(row, about) and not row["setting"]["carry_state"]), None)
    if mark is None:
        return {"compute_ratio_at_equal_quality": None, "quality_at_equal_compute": {"paper": None, "ours": None}}
    same_seeds = [row for row in rows if row["seeds"] == mark["seeds"]]
    ours = [row for row in same_seeds if row["recipe"] in config["ours"]]
    sides = ([row for row in same_seeds if row["recipe"] == config["paper"]], ours)
    as_good = [[row["macs_per_sample"] for row in of if sign * row["mean"] >= sign * mark["mean"]] for of in sides]
    affordable = [
        [sign * row["mean"] for row in of if row["macs_per_sample"] <= mark["macs_per_sample"]] for of in sides
    ]
    best = [sign * max(values) if values else None for values in affordable]
    ratios = [min(macs) / mark["macs_per_sample"] if macs else None for macs in as_good]
    return {
        "compute_ratio_at_equal_quality": ratios[1],
        "compute_ratio_of_the_recipe_itself": ratios[0],
        "quality_at_equal_compute": {"paper": best[0], "ours": best[1]},
        "paper_at_l_max": mark,
        "held_out": held_out(ours, mark, sign),
        "worth": {
            recipe: found
            for recipe in config["recipes"]
            if (found := worth([row for row in same_seeds if row["recipe"] == recipe], about, sign))
        },
    }


def is_plain(row: dict[str, Any], about: dict[str, Any], **turned: Any) -> bool:
    """Return whether a row is of L_max and all steps of training's recipe, but for what is ``turned``."""
    plain = {
        "loops": about["train_loops"],
        "steps": about["sampling_steps"],
        "guidance": about["guidance"],
        "exit_scale": 0,
        "loop_schedule": "constant",
        "tolerance": None,
    }
    return {name: row["setting"].get(name) for name in plain} == plain | turned


def held_out(ours: Rows, mark: dict[str, Any], sign: int) -> dict[str, Any] | None:
    """Choose our best setting within half of the recipe's compute on all seeds but one, and score it on that one.

    Returns:
        for each seed the ``compute_ratio``, over the paper's recipe at L_max, and the ``difference`` in score, above 0
        where ours is better. None with fewer than two seeds, or where no setting is so cheap.
    """
    affordable = [row for row in ours if row["macs_per_sample"] <= HALF * mark["macs_per_sample"]]
    places = range(len(mark["values"]))
    if len(places) < 2 or not affordable:
        return None
    ratios, differences = [], []
    for place in places:

        def on_the_others(row: dict[str, Any], left_out: int = place) -> float:
            return sign * mean(value for at, value in enumerate(row["values"]) if at != left_out)

        chosen = max(affordable, key=on_the_others)
        ratios.append(chosen["macs_per_sample"] / mark["macs_per_sample"])
        differences.append(sign * (chosen["values"][place] - mark["values"][place]))
    return {"compute_ratio": ratios, "difference": differences}


KNOBS: dict[str, Callable[[dict[str, Any], dict[str, Any]], bool]] = {
    "exit guidance": lambda row, about: (
        row["setting"]["exit_scale"] > 0 and is_plain(row, about, exit_scale=row["setting"]["exit_scale"])
    ),
    "class guidance": lambda row, about: (
        row["setting"]["guidance"] != about["guidance"]
        and is_plain(row, about, guidance=row["setting"]["guidance"], steps=row["steps"])
    ),
    "falling": lambda row, about: is_plain(row, about, loop_schedule="falling"),
    "rising": lambda row, about: is_plain(row, about, loop_schedule="rising"),
    "tolerance": lambda row, about: (
        row["setting"]["tolerance"] is not None
        and is_plain(row, about, loops=row["setting"]["loops"], tolerance=row["setting"]["tolerance"])
    ),
}
"""Ways to spend the compute of L_max loops in every step otherwise."""


def worth(rows: Rows, about: dict[str, Any], sign: int) -> dict[str, Any]:
    """Return what each of the :data:`KNOBS` is worth to a recipe, alone and for the compute of L_max in all its steps.

    Returns:
        {"plain": the score without any, each knob: {"score": the best one with it, "setting", "macs_per_sample"}};
        without the knobs that were not measured. From zero and carried alike, where the state is carried by default.
    """
    carried = any(row["setting"].get("carry_state") for row in rows)
    rows = [row for row in rows if row["setting"].get("carry_state") == carried]
    plain = next((row for row in rows if is_plain(row, about)), None)
    if plain is None:
        return {}
    found: dict[str, Any] = {"plain": plain["mean"]}
    for knob, is_turned in KNOBS.items():
        most = EQUAL_COMPUTE * plain["macs_per_sample"]
        turned = [row for row in rows if row["macs_per_sample"] <= most and is_turned(row, about)]
        if turned:
            best = max(turned, key=lambda row: sign * row["mean"])
            found[knob] = {"score": best["mean"], "std": best["std"], "tried": len(turned)}
            found[knob] |= {name: best[name] for name in ("setting", "macs_per_sample")}
    return found


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


def front_of(rows: Rows, higher_is_better: bool) -> list[dict[str, Any]]:
    """Return the rows that no other is as cheap as and better."""
    by_score = {(row["macs_per_sample"], row["mean"]): row for row in rows}
    tried = [Tried(0, {}, 0.0, *key) for key in by_score]
    return [by_score[each.macs_per_sample, each.score] for each in pareto_front(tried, higher_is_better)]


def recipes_in(rows: Rows) -> list[str]:
    """List the recipes of some rows, in order."""
    return list(dict.fromkeys(row["recipe"] for row in rows))


def label_of(recipe: str, config: dict[str, Any]) -> str:
    """Return how a recipe is called."""
    return str(config["recipes"][recipe]["label"] if recipe in config["recipes"] else recipe.replace("_", " "))


def figure(summary: dict[str, Any], config: dict[str, Any]) -> Figure:
    """Draw each testbed: all settings as dots, the front of each recipe as a line, its spread over seeds as bars."""
    testbeds = summary["testbeds"]
    columns = min(2, len(testbeds))
    drawing = Figure(figsize=(7 * columns, 4.8 * ceil(len(testbeds) / columns)), dpi=110, layout="constrained")
    names = dict.fromkeys(recipe for each in testbeds.values() for recipe in together(each["rows"]))
    colours = dict(zip(names, COLOURS, strict=False))
    for at, (name, testbed) in enumerate(testbeds.items(), start=1):
        axes = drawing.add_subplot(ceil(len(testbeds) / columns), columns, at)
        axes.set(title=name, xscale="log", xlabel="10⁹ multiply–accumulates per sample")
        for recipe, rows in together(testbed["rows"]).items():
            front = front_of(rows, testbed["higher_is_better"])
            axes.scatter(*places_of(rows), s=8, color=colours[recipe], alpha=0.3)
            axes.errorbar(
                *places_of(front), yerr=[row["std"] or 0.0 for row in front], color=colours[recipe], marker="o",
                markersize=4, capsize=2, linewidth=1.3, label=label_of(recipe, config),
            )  # fmt: skip
        if "paper_at_l_max" in testbed:
            draw_mark(axes, testbed["paper_at_l_max"], testbed["compute_ratio_at_equal_quality"])
        direction = "higher" if testbed["higher_is_better"] else "lower"
        axes.set_ylabel(f"{testbed['metric']} ({direction} is better)")
        if not testbed["higher_is_better"]:
            axes.set_yscale("log")  # distances of the worst settings would hide all others
        axes.grid(alpha=0.3)
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return drawing


def together(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Sort rows by recipe, those we compare with last, and unlooped models of whatever depth as one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: "steps" in row["setting"], reverse=True):
        found.setdefault(UNLOOPED if row["recipe"].startswith("unlooped") else row["recipe"], []).append(row)
    return found


def places_of(rows: Rows) -> tuple[list[float], list[float]]:
    """Return where rows stand in the figure."""
    return [row["macs_per_sample"] / 1e9 for row in rows], [row["mean"] for row in rows]


def draw_mark(axes: Axes, mark: dict[str, Any], ratio: float | None) -> None:
    """Draw the recipe at L_max as a star, and an arrow to where ours is as good; leave out what costs far more."""
    (x,), (y,) = places_of([mark])
    axes.scatter([x], [y], marker="*", s=180, color="black", zorder=4, label="the paper's recipe at L_max")
    axes.set_xlim(right=SHOWN * x)
    if ratio is not None:
        arrow = {"arrowstyle": "->", "linewidth": 1.5}
        axes.annotate("", xy=(ratio * x, y), xytext=(x, y), arrowprops=arrow, zorder=4)
        axes.annotate(f"× {ratio:.2f}", (ratio**0.5 * x, y), textcoords="offset points", xytext=(0, 4), ha="center")


def page(name: str, testbed: dict[str, Any], config: dict[str, Any]) -> str:
    """Write a testbed's verdict, and the front of every recipe, as Markdown."""
    ratio, equal = testbed["compute_ratio_at_equal_quality"], testbed["quality_at_equal_compute"]
    lines = [f"## {name}", "", f"{testbed['num_samples']} samples for each seed; metric {testbed['metric']}. "]
    if "paper_at_l_max" in testbed:
        mark = testbed["paper_at_l_max"]
        reached = "no setting of ours is as good" if ratio is None else f"ours needs {ratio:.2f} of its compute"
        own = f"{testbed['compute_ratio_of_the_recipe_itself']:.2f}"
        paper, ours = (f"{value:.4g}" if value is not None else "nothing" for value in equal.values())
        lines[-1] += (
            f"The paper's recipe at L_max has {mark['mean']:.4g}: for as much {reached} (the recipe itself {own}, with "
            f"settings chosen as freely). At equal compute the recipe reaches {paper} and ours {ours}. Settings were "
            "chosen by these very scores: the best of many is a little lucky. "
            f"{held_out_in_words(testbed['held_out'])}"
        )
        lines += ["", *worth_table(testbed["worth"], config).splitlines()]
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


def held_out_in_words(found: dict[str, Any] | None) -> str:
    """Write what the best settings for half the compute, chosen on the other seeds, came to."""
    if found is None:
        return "That luck is not measured: it takes two seeds, and a setting within half of the compute."
    ratios, differences = (", ".join(f"{value:.3g}" for value in found[name]) for name in found)
    return (
        f"The best within half of the compute, chosen on the other seeds' models, takes {ratios} of it and is ahead of "
        f"the recipe by {differences}, seed by seed (below 0: behind)."
    )


def worth_table(found: dict[str, Any], config: dict[str, Any]) -> str:
    """Lay out what each knob is worth to each recipe, at the compute of L_max in all its steps."""

    def cell(recipe: dict[str, Any], knob: str) -> str:
        if knob not in recipe:
            return "–"
        best, note = recipe[knob], f"best of {recipe[knob]['tried']}"
        return f"{best['score']:.4g} ({in_words(best['setting']['loops'], best['setting'])}; {note})"

    knobs = [knob for knob in KNOBS if any(knob in recipe for recipe in found.values())]
    rows = [
        (label_of(name, config), f"{recipe['plain']:.4g}", *(cell(recipe, knob) for knob in knobs))
        for name, recipe in found.items()
    ]
    return markdown_table(("at the compute of L_max and all steps", "nothing else", *knobs), rows)

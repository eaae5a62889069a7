"""What a sweep leaves behind: a table, ``loops.json``, ``loops.csv``, ``loops.png`` and ``pareto.png``."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from elt_lightning.checkpoints.shipped import goodness
from elt_lightning.evaluation.pictures import GAP, loops_figure, pictures_of, write_figure, write_gif
from elt_lightning.evaluation.spent import QUANTILES, in_brief
from elt_lightning.evaluation.sweep import Row
from elt_lightning.files import write_json, written_aside

matplotlib.use("Agg")

OF_THE_SWEEP = (
    *("primary_metric", "higher_is_better", "feature_network", "num_samples", "parts_given", "seed"),
    *("train_loops", "train_mode", "train_steps", "sampling_steps", "recall", "weights"),
)
"""What ``loops.json`` has beside its rows."""


@dataclass(frozen=True)
class Report:
    """A finished sweep with everything needed to read it."""

    rows: Sequence[Row]  # one per loop count and setting of the sampler
    primary_metric: str  # decides which row is best
    higher_is_better: bool  # direction of the primary metric
    feature_network: str | None  # whose features the Fréchet distance compares, None without one
    num_samples: int  # per repeat
    seed: int  # of the first repeat
    train_loops: int  # L_max of training
    train_mode: str  # of `ILSD`
    train_steps: int | None  # optimiser steps that the model was trained for; None where that is not known
    sampling_steps: int  # K
    recall: bool  # whether every loop reads the input again
    weights: str  # "ema" or "raw"
    params_backbone: int  # parameters inside the looped stack
    params_total: int  # parameters of the whole network
    effective_depth: dict[int, int]  # {loops: layers passed through}
    class_names: Sequence[str] | None = None  # in the order of their numbers

    @property
    def parts_given(self) -> bool:
        """Whether parts of the samples were given, as in puzzles; whole samples score otherwise."""
        return len(self.rows[0].given) > 0

    def best(self, rows: Sequence[Row]) -> Row:
        """Pick the row that is best in the primary metric."""
        return max(rows, key=lambda row: goodness(row.mean(self.primary_metric), self.higher_is_better))

    def best_per_loop(self) -> list[Row]:
        """Pick the best setting of the sampler for each loop count, in order of loops."""
        counts = sorted({row.loops for row in self.rows})
        return [self.best([row for row in self.rows if row.loops == loops]) for loops in counts]

    def titles(self, labels: Tensor) -> list[str]:
        """Return the names of the classes, or else their numbers; nothing where no class was asked for."""
        if self.class_names is None:
            return [str(number) for number in labels.tolist()]
        names = [*self.class_names, ""]  # the null class is the last
        return [names[number] for number in labels.tolist()]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain data: the content of ``loops.json``."""
        return {name: getattr(self, name) for name in OF_THE_SWEEP} | {
            "rows": [
                {
                    "loops": row.loops,
                    "effective_depth": self.effective_depth[row.loops],
                    **row.settings,
                    "mean_loops": row.mean_loops,
                    **{f"loops_{name}": row.loops_spread and row.loops_spread.quantiles[name][0] for name in QUANTILES},
                    "metrics": {name: {"mean": row.mean(name), "std": row.std(name)} for name in row.metrics},
                    "params_backbone": self.params_backbone,
                    "params_total": self.params_total,
                    "macs_per_sample": row.macs_per_sample,
                    "samples_per_second": row.samples_per_second,
                }
                for row in self.rows
            ],
        }

    def table(self) -> Table:
        """Lay the rows out for a terminal; where the sampler was swept, a star marks each loop count's best."""
        names = list(self.rows[0].metrics)
        swept = len(self.rows) > len({row.loops for row in self.rows})
        direction = "higher" if self.higher_is_better else "lower"
        steps = ", ".join(map(str, sorted({row.settings["steps"] for row in self.rows})))
        table = Table(
            title=f"{self.num_samples} samples{', parts of each given' if self.parts_given else ''}, {steps} steps, "
            f"trained at {self.train_loops} loops{', with recall' if self.recall else ''}",
            caption=f"{self.primary_metric}: {direction} is better" + ("; * best of its loop count" if swept else ""),
        )
        first = self.rows[0].settings
        columns = {
            name: show
            for name, (show, off) in COLUMNS.items()
            if any(show(row.settings) != (show(first) if off is None else off) for row in self.rows)
        }
        settles = any(row.loops_spread is not None for row in self.rows)
        spent = ["mean loops (10 to 90 %)"] if settles else []
        for heading in ("loops", "depth", "backbone params", *columns, *spent, *names, "GMACs/sample", "samples/s"):
            table.add_column(heading, justify="right")
        best = self.best_per_loop()
        for row in self.rows:
            mark = " *" if swept and any(row is chosen for chosen in best) else ""
            table.add_row(
                f"{row.loops}{mark}",
                str(self.effective_depth[row.loops]),
                _short(self.params_backbone),
                *(show(row.settings) for show in columns.values()),
                *([_spent(row)] if settles else []),
                *(_value(row, name) for name in names),
                f"{row.macs_per_sample / 1e9:.3g}",
                f"{row.samples_per_second:.3g}",
            )
        return table

    def write(self, folder: Path) -> None:
        """Write the files, for clips an animation too; each appears whole or not at all."""
        write_json(folder / "loops.json", self.as_dict(), indent=2)
        lines = self.lines()
        with written_aside(folder / "loops.csv") as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        best = self.best_per_loop()
        pictures = labelled_pictures(best)
        if best[0].pictures.ndim == 5:
            write_gif(folder / "loops.gif", pictures)
        correct = [torch.empty(0)] * (len(pictures) - len(best)) + [row.correct for row in best]
        write_figure(folder / "loops.png", loops_figure(pictures, correct, self.titles(best[0].labels)))
        write_figure(folder / "pareto.png", self.pareto_figure(best))
        tolerances = sorted({row.settings["tolerance"] for row in self.rows} - {None})
        if tolerances:
            settled = [self.best([r for r in self.rows if r.settings["tolerance"] == value]) for value in tolerances]
            with written_aside(folder / "loops_spent.png") as aside:
                loops_spent_figure({in_words(row.loops, row.settings): row for row in settled}).savefig(aside)

    def lines(self) -> list[dict[str, str]]:
        """Return the rows as a flat table, metrics and their deviations as columns: the content of ``loops.csv``."""
        lines = []
        for row in self.as_dict()["rows"]:
            parts = (("", "mean"), ("_std", "std"))
            scores = {f"{name}{end}": score[part] for name, score in row["metrics"].items() for end, part in parts}
            places = [scores.items() if name == "metrics" else [(name, value)] for name, value in row.items()]
            line = dict(pair for pairs in places for pair in pairs)
            # Seven digits are what float32 holds; the JSON has all.
            shown = {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in line.items()}
            lines.append({name: "" if value is None else str(value) for name, value in shown.items()})
        return lines

    def pareto_figure(self, rows: Sequence[Row]) -> Figure:
        """Draw the primary metric against compute, one point per loop count: the any-time curve."""
        figure = Figure(figsize=(6, 4), dpi=120)
        axes = figure.add_subplot()
        macs = [row.macs_per_sample / 1e9 for row in rows]
        values = [row.mean(self.primary_metric) for row in rows]
        errors = [row.std(self.primary_metric) or 0.0 for row in rows]
        axes.errorbar(macs, values, yerr=errors, marker="o", capsize=3, color="tab:blue")
        for row, x, y in zip(rows, macs, values, strict=True):
            trained = row.loops == self.train_loops
            axes.annotate(
                f"L={row.loops}" + ("\ntrained" if trained else ""),
                (x, y),
                textcoords="offset points",
                xytext=(0, -10),
                ha="center",
                va="top",
                fontsize=9,
                weight="bold" if trained else "normal",
            )
        axes.margins(x=0.1, y=0.2)
        axes.set_xlim(left=0)
        axes.set_xlabel("compute per sample (10⁹ multiply–accumulates)")
        axes.set_ylabel(f"{self.primary_metric} ({'higher' if self.higher_is_better else 'lower'} is better)")
        axes.grid(alpha=0.3)
        return figure


def _exit_guidance(settings: Mapping[str, Any]) -> str:
    return f"{settings['exit_scale']:g} from {settings['weak_loops']}" if settings["exit_scale"] else ""


def _tolerance(settings: Mapping[str, Any]) -> str:
    return "" if settings["tolerance"] is None else f"{settings['tolerance']:g}"


COLUMNS: dict[str, tuple[Callable[[Mapping[str, Any]], str], str | None]] = {
    "steps": (lambda settings: str(settings["steps"]), None),
    "guidance": (lambda settings: f"{settings['guidance']:g}", ""),
    "exit guidance": (_exit_guidance, ""),
    "state": (lambda settings: "carried" if settings["carry_state"] else "from zero", "from zero"),
    "schedule": (lambda settings: str(settings["loop_schedule"]), "constant"),
    "tolerance": (_tolerance, ""),
}
"""Columns of the table for settings of the sampler: how they are shown, and what stands for nothing; None where only
differences matter. A column in which there is nothing to see is left out."""


def in_words(loops: int, settings: Mapping[str, Any]) -> str:
    """Write what was measured: a loop count and the settings of a sampler, without those that are off."""
    shown = {name: show(settings) for name, (show, off) in COLUMNS.items()}
    shown = {name: text for name, text in shown.items() if text != COLUMNS[name][1]}
    return ", ".join([f"loops {loops}", *(f"{name} {text}" for name, text in shown.items())])


def _spent(row: Row) -> str:
    return f"{row.mean_loops:g}" if row.loops_spread is None else in_brief(row.loops_spread)


def write_reconstruction(folder: Path, scores: dict[str, float]) -> None:
    """Print the scores of pictures that were only encoded and decoded, and write them to ``reconstruction.json``."""
    write_json(folder / "reconstruction.json", scores, indent=2)
    print("reconstruction:", ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    print(folder / "reconstruction.json")


def labelled_pictures(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return {label: pictures}: what was given, if anything was, then the samples of each loop count."""
    given = {"given": rows[0].given} if len(rows[0].given) else {}
    return given | {
        f"L = {row.loops}{', carried' if row.settings['carry_state'] else ''}": row.pictures for row in rows
    }


def loops_spent_figure(rows: dict[str, Row]) -> Figure:
    """Draw, for each row, the loops of every sampling step, and below a map of the loops of single samples."""
    figure = Figure(figsize=(4 * len(rows), 6), dpi=100, layout="constrained")
    grid = figure.subplots(2, len(rows), squeeze=False, sharex="col")
    most = max(float(row.loops_map.max()) for row in rows.values())
    for (label, row), top, bottom in zip(rows.items(), *grid, strict=True):
        assert row.loops_per_step is not None
        loops, quantiles, mapped = row.loops_per_step.mean, row.loops_per_step.quantiles, row.loops_map[:MOST_MAPPED]
        top.plot(range(1, len(loops) + 1), loops, marker=".", label="mean")
        top.fill_between(
            range(1, len(loops) + 1), quantiles["p10"], quantiles["p90"], alpha=0.3, label="10 to 90 % of samples"
        )
        top.set_title(label.replace(", ", "\n"), fontsize=8)
        top.set(ylabel="loops", ylim=(0, 1.05 * most))
        top.legend(fontsize=8)
        extent = (0.5, len(loops) + 0.5, len(mapped) + 0.5, 0.5)
        shown = bottom.imshow(mapped.numpy(), aspect="auto", extent=extent, vmin=0, vmax=most, interpolation="nearest")
        bottom.set(xlabel="sampling step", ylabel="sample")
        figure.colorbar(shown, ax=bottom, label="loops")
    return figure


MOST_MAPPED = 64
"""Samples whose loops are drawn one by one."""


def picture_row(samples: Tensor) -> Tensor:
    """Lay pictures, or frames of clips, side by side, white between: (H + 2, n·(W + 2)), or (…, …, 3) in colour."""
    padded = torch.nn.functional.pad(pictures_of(samples), (0, GAP, 0, GAP), value=255)
    row = padded.permute(2, 0, 3, 1).flatten(1, 2)  # H (n W) C
    return row.squeeze(-1)


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _value(row: Row, name: str) -> str:
    std = row.std(name)
    return f"{row.mean(name):.4g}" + (f" ± {std:.2g}" if std is not None else "")

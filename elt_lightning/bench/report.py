"""What `elt bench` measured, for readers: the tables of the terminal and of ``figures.md``, from the JSON alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from elt_lightning.bench.runs import read_runs
from elt_lightning.bench.timing import half_spread
from elt_lightning.errors import UserError
from elt_lightning.files import markdown_table, write_text

MIB = 2**20
Row = dict[str, Any]


@dataclass
class Lines:
    """A table: what it is, its headings, its cells."""

    title: str
    headings: tuple[str, ...]
    cells: list[tuple[str, ...]] = field(default_factory=list)

    def markdown(self) -> str:
        """Lay the table out."""
        return f"**{self.title}**\n\n{markdown_table(self.headings, self.cells)}\n"


def ratio(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Divide the times of two contenders round by round: median, and half of the distance between the quartiles."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return median(ratios), half_spread(ratios)


def find(rows: Iterable[Row], like: Row, keys: Sequence[str], **other: object) -> Row | None:
    """Find the row that agrees with ``like`` in ``keys``, except for what ``other`` sets."""
    wanted = {key: like[key] for key in keys} | other
    return next((row for row in rows if wanted.items() <= row.items()), None)


INFERENCE_KEYS = ("shape", "num_layers", "loops", "compile", "batch_size", "precision", "steps", "guidance", "model")
TRAINING_KEYS = (
    "shape",
    "num_layers",
    "loops",
    "way",
    "compile",
    "activation_checkpointing",
    "batch_size",
    "precision",
)


def speed_over_unlooped(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """Return the samples/s of a looped row over those of the unlooped model of equal depth, with spread."""
    other = find(rows, row, INFERENCE_KEYS, model="unlooped")
    return None if other is None else ratio(other["sample_seconds"], row["sample_seconds"])


def time_over(row: Row, rows: Sequence[Row], **other: object) -> tuple[float, float] | None:
    """Return the seconds of a step over those of another row, with spread; None where there is no such row."""
    against = find(rows, row, TRAINING_KEYS, **other)
    return None if against is None else ratio(row["step_seconds"], against["step_seconds"])


def inference_lines(rows: Sequence[Row]) -> Lines:
    """Lay out looped rows, each beside its unlooped one.

    "L·speed" is samples per second times L, over that at the most loops: 1 where speed is linear in 1/L.
    """
    lines = Lines(
        "samples per second",
        (
            *("size", "N×L", "batch", "compile", "precision", "steps", "samples/s", "unlooped samples/s"),
            *("looped / unlooped", "L·speed", "s to first sample", "first call, s", "pass, share of peak"),
            *("peak MiB", "unlooped peak MiB"),
        ),
    )
    for row in rows:
        if row["model"] != "looped":
            continue
        other = find(rows, row, INFERENCE_KEYS, model="unlooped")
        most = max(found["loops"] for found in rows if found["model"] == "looped" and found["shape"] == row["shape"])
        deepest = find(rows, row, INFERENCE_KEYS, loops=most)
        lines.cells.append(
            (
                row["shape"],
                f"{row['num_layers']}×{row['loops']}",
                str(row["batch_size"]),
                row["compile"],
                row["precision"],
                str(row["steps"]) + ("" if row["guidance"] == 1 else f", guidance {row['guidance']:g}"),
                f"{row['samples_per_second']:,.3g}",
                "" if other is None else f"{other['samples_per_second']:,.3g}",
                with_spread(speed_over_unlooped(row, rows)),
                "" if deepest is None else f"{_scaled(row) / _scaled(deepest):.2f}",
                f"{median(row['sample_seconds']):.3g}" if row["batch_size"] == 1 else "",
                f"{row['first_call_seconds']:.3g}",
                f"{100 * row['pass_share_of_peak']:.0f} %",
                mebibytes(row["peak_memory_bytes"]),
                "" if other is None else mebibytes(other["peak_memory_bytes"]),
            )
        )
    return lines


def _scaled(row: Row) -> float:
    return row["samples_per_second"] * row["loops"]


def training_lines(rows: Sequence[Row]) -> Lines:
    """Lay out steps, with their times over those of vanilla looping and of the unlooped model of equal depth."""
    lines = Lines(
        "a training step",
        (
            *("size", "N×L", "way", "batch", "compile", "each loop recomputed", "precision", "images/s", "s a step"),
            *("time / vanilla", "time / ILSD", "time / unlooped", "share of peak", "peak MiB", "unlooped − this, MiB"),
        ),
    )
    for row in rows:
        unlooped = find(rows, row, TRAINING_KEYS, way="unlooped", activation_checkpointing=False)
        saved = None if unlooped is None else unlooped["peak_memory_bytes"] - row["peak_memory_bytes"]
        looped = row["way"] != "unlooped"
        lines.cells.append(
            (
                row["shape"],
                f"{row['num_layers']}×{row['loops']}" if looped else str(row["num_layers"] * row["loops"]),
                row["way"],
                str(row["batch_size"]),
                row["compile"],
                "yes" if row["activation_checkpointing"] else "no",
                row["precision"],
                f"{row['images_per_second']:,.3g}",
                f"{median(row['step_seconds']):.3g}",
                with_spread(time_over(row, rows, way="vanilla")) if row["way"] in ("ilsd", "recall") else "",
                with_spread(time_over(row, rows, way="ilsd")) if row["way"] == "recall" else "",
                with_spread(time_over(row, rows, way="unlooped", activation_checkpointing=False)) if looped else "",
                f"{100 * row['share_of_peak']:.0f} %",
                mebibytes(row["peak_memory_bytes"]),
                mebibytes(saved) if looped and saved is not None else "",
            )
        )
    return lines


def mebibytes(number: int) -> str:
    """Write a number of bytes."""
    return f"{number / MIB:,.1f}"


def with_spread(value: tuple[float, float] | None) -> str:
    """Write a ratio with half of the distance between its quartiles."""
    return "" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}"


MEASURED: dict[str, Callable[[list[Row]], Lines]] = {
    "inference.json": inference_lines,
    "training.json": training_lines,
}
"""What `elt bench` writes, and what lays it out."""


def figures(folder: Path) -> str:
    """Lay out all that was measured into a page of Markdown."""
    parts = [
        "# Measured",
        "",
        "Made by `elt bench report` from the JSON beside it; [README.md](README.md) says what the columns mean.",
        "Medians over rounds in which all rows of a size and batch took turns; ± is half of the distance between the",
        "quartiles.",
        "",
    ]
    for name, lay_out in MEASURED.items():
        for run in read_runs(folder / name):
            lines = lay_out(run["rows"])
            threads = f"{run['threads']} thread{'s' * (run['threads'] != 1)}"
            lines.title += f": {run['device']}, {threads}, torch {run['torch']}"
            parts += [lines.markdown(), f"`{run['command']}`", ""]
    return "\n".join(parts).rstrip() + "\n"


def write_figures(folder: Path) -> Path:
    """Write ``figures.md`` beside the JSON (UserError: there is none)."""
    if not any((folder / name).is_file() for name in MEASURED):
        raise UserError(f"{folder} holds none of {', '.join(MEASURED)}: elt bench inference --output makes one")
    path = folder / "figures.md"
    write_text(path, figures(folder))
    return path

"""`make table1` and its like: a table of the paper, its numbers beside what was counted and measured here.

Writes ``table1.md``, ``table1.csv`` and ``table1.json``. A "paper" column holds what is printed, a "counted" one what
follows from the configs alone, a "measured" one what `elt test` or a benchmark left behind, and nothing else: it is
empty where there is nothing.

Tables 1, 2 and 4 read ``<measured>/<config>/test*/loops.json``. Tables 3 and 8 read what `elt bench` wrote, several
runs to a file, where rows of one shape, batch size, compilation and precision took turns in one run (sizes are those of
:data:`elt_lightning.bench.shapes.SHAPES`; of each row more is there, which these tables do not read)::

    inference.json  {"runs": [{"device": "…", "device_type": "cuda", "command": "elt bench inference …", "rows": [
                     {"shape": "L", "num_layers": 8, "loops": 3, "model": "looped" or "unlooped", "batch_size": 8,
                      "compile": "no", "precision": "bf16-true", "steps": 24, "guidance": 1.0,
                      "sample_seconds": [0.9, …, one for each round], "samples_per_second": 9.1,
                      "pass_share_of_peak": 0.6}, …]}]}
    training.json   {"runs": [{"device": "…", "device_type": "cuda", "command": "elt bench train …", "rows": [
                     {"shape": "wide", "num_layers": 8, "loops": 4, "way": "ilsd", "vanilla" or "unlooped",
                      "batch_size": 32, "compile": "no", "activation_checkpointing": false, "precision": "bf16-mixed",
                      "step_seconds": [1.2, …], "peak_memory_bytes": 123}, …]}]}

``num_layers`` and ``loops`` of an unlooped row are those of the looped one that it stands beside.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from elt_lightning.bench.report import TRAINING_KEYS, find, speed_over_unlooped, time_over
from elt_lightning.bench.report import Row as Measured
from elt_lightning.bench.runs import read_runs
from elt_lightning.files import markdown_table, write_text
from elt_lightning.metrics.fid import name_with_count
from elt_lightning.reproduce.accounting import Count, count_row, count_scale, gflops_as_printed, params_as_printed
from elt_lightning.reproduce.published import (
    PAPER,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_3_BATCH,
    TABLE_4,
    TABLE_8,
    Printed,
    Row,
)
from elt_lightning.reproduce.sweeps import difference, drawn_alike, read_sweep, steps_of

SMALL_SCALE = (
    "small-scale twin: small networks, data that the project makes; its numbers do not compare with the paper's"
)

TITLES = {
    1: "ImageNet 256×256, masked generation",
    2: "ImageNet 256×256, diffusion",
    3: f"inference throughput over the unlooped baseline of the same scale, batch {TABLE_3_BATCH}",
    4: "UCF-101, class-conditional",
    8: "a training step of ELT 8N×4L over one of the 32-layer DiT",
}

NOTES = {
    1: [
        "GFLOPs are multiply–accumulates of a sample in the layers alone, 24 steps × 2 branches of guidance, without "
        "the attention products QKᵀ and PV: counted so, the rows of scale L come out. Those of scale XL do not, and we "
        "know of no way to derive what is printed there.",
    ],
    2: [
        "The paper does not describe the network. Width 2048, FiLM blocks and a condition of width 1024 are inferred "
        "from its parameter counts, of whole networks (params_total); they are not the only solution.",
    ],
    3: [
        "A looped model and its baseline take the same multiply–accumulates; what differs is the size of the weights. "
        "The paper measured on one TPU v6e. Counted are masked ImageNet models. Share of peak: operations per second "
        "of one pass over those of the fastest square matrix product in the same run and precision.",
    ],
    4: [
        "GFLOPs are multiply–accumulates of a sample in the layers alone, attention products included, without "
        "guidance.",
        "The printed parameters of MAGVIT-L come out with embeddings and head (params_total), those of ELT without "
        "them (params_backbone). MaGNeTS is another method, which this project does not build.",
    ],
    8: [
        'Ratios are of ELT over DiT; "the same" is taken as 1×. FLOPs are counted in the forward pass; the student of '
        "ILSD adds one application of the head, under 0.1 % of it. The paper measured on TPU v6e.",
        "How much memory the looped model saves depends on the batch, which the paper does not tell: the parameters' "
        "share shrinks as it grows. The row of the largest batch measured stands for the paper's. In the "
        "measurements that come with the project it is 47, chosen by computing where 34 % are saved: that it comes out "
        "so says that there is such a batch, and no more.",
    ],
}

HEADINGS = {
    "fid": "FID",
    "fvd": "FVD",
    "inception_score": "IS",
    "gflops": "GFLOPs",
    "gmacs_per_pass": "GMACs of a pass",
    "gmacs_per_sample": "GMACs of a sample",
    "depth": "D",
}

COUNTED = ("depth", "params", "params_backbone", "params_total", "gflops", "gmacs_per_pass", "gmacs_per_sample")
"""What needs no training, in the order of its columns in Tables 1, 2 and 4."""

Kind = Literal["paper", "counted", "measured"]


class Column(NamedTuple):
    """A quantity, and where its values are from."""

    quantity: str
    kind: Kind


@dataclass(frozen=True)
class Value:
    """A number of ours, with its spread over repeats where there is one: standard deviation if no note says else."""

    value: float
    spread: float | None = None


Cells = dict[Column, Printed | Value]


def cells_of(kind: Kind, values: Mapping[str, Printed | Value | float | None]) -> Cells:
    """Fill cells of one kind, but those of quantities that are None."""
    filled = {name: value for name, value in values.items() if value is not None}
    return {Column(n, kind): v if isinstance(v, Printed | Value) else Value(v) for n, v in filled.items()}


@dataclass
class Table:
    """A table to write: its columns, and of each row the cells that are filled."""

    number: int
    small_scale: bool
    columns: list[Column] = field(default_factory=list)
    rows: dict[str, Cells] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The title; small models are named as such."""
        what = f", {SMALL_SCALE}" if self.small_scale else f": {TITLES[self.number]}"
        return f"Table {self.number}{what}"

    def flat_rows(self) -> list[dict[str, str | float | None]]:
        """Return rows as plain numbers by ``<quantity>_<kind>``; spreads have columns of their own."""
        flat: list[dict[str, str | float | None]] = [{"model": model} for model in self.rows]
        for column in self.columns:
            found, name = [cells.get(column) for cells in self.rows.values()], "_".join(column)
            has_spread = any(cell is not None and cell.spread is not None for cell in found)
            for row, cell in zip(flat, found, strict=True):
                row[name] = None if cell is None else cell.value
                if has_spread:
                    row[f"{name}_spread"] = None if cell is None else cell.spread
        return flat

    def markdown(self) -> str:
        """Lay it out for readers."""
        headings = [f"{HEADINGS.get(quantity, quantity)}, {kind}" for quantity, kind in self.columns]
        lines = [
            [model, *(shown(column.quantity, cells.get(column)) for column in self.columns)]
            for model, cells in self.rows.items()
        ]
        table = markdown_table(["model", *headings], lines)
        return "\n".join([f"# {self.title}", "", table, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def write(self, folder: Path) -> None:
        """Write it as Markdown, CSV and JSON."""
        stem, rows = folder / f"table{self.number}", self.flat_rows()
        write_text(stem.with_suffix(".md"), self.markdown())
        write_text(stem.with_suffix(".csv"), pd.DataFrame(rows, dtype=object).to_csv(index=False))
        content = {"table": self.number, "title": self.title, "rows": rows, "notes": self.notes}
        write_text(stem.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(stem.with_suffix(".md"))


def shown(quantity: str, cell: Printed | Value | None) -> str:
    """Write a cell for readers: what is printed to the letter, our own numbers with the digits that matter."""
    if cell is None:
        return ""
    if isinstance(cell, Printed):
        return cell.text
    if quantity.startswith("params"):
        return f"{cell.value / 1e6:,.1f}M" if cell.value >= 1e6 else f"{cell.value:,.0f}"
    if quantity.endswith("ratio"):
        return f"{cell.value:.2f}×" + ("" if cell.spread is None else f" ± {cell.spread:.2f}")
    if quantity.startswith("share"):
        return f"{100 * cell.value:.0f} %"
    spread = "" if cell.spread is None else f" ± {cell.spread:.2g}"
    return (f"{cell.value:,.0f}" if cell.value >= 1000 else f"{cell.value:.4g}") + spread


@dataclass(frozen=True)
class Result:
    """What `elt test` measured of a row's model at its loop count."""

    path: Path  # of the ``loops.json``
    report: dict[str, Any]  # all of it
    row: dict[str, Any]  # of the report
    # name of the metric that decides: one of the wanted kind, plain or with its count; None without any
    distance: str | None

    def goodness(self, kind: str) -> tuple[float, float]:
        """Order results: of more samples first, then lower ones; those without the metric last."""
        if self.distance is None:
            return (0.0, 0.0)
        return count_in(self.distance, kind), -self.row["metrics"][self.distance]["mean"]

    def values(self, kind: str, with_score: bool) -> dict[str, Value]:
        """Return what was measured by the name that it may stand under.

        The Inception score depends on the number of samples too: it gets the count behind its name unless the distance
        beside it has a plain one.
        """
        scores = self.row["metrics"]
        found = {} if self.distance is None else {self.distance: scores[self.distance]}
        if with_score and "inception_score" in scores:
            with_count = name_with_count(self.report["num_samples"], "inception_score")
            found["inception_score" if self.distance == kind else with_count] = scores["inception_score"]
        return {name: Value(score["mean"], score["std"]) for name, score in found.items()}

    def note(self) -> str:
        """Return where it is from."""
        report, steps = self.report, self.report["train_steps"]
        trained = "an unknown number of" if steps is None else f"{steps:,}"
        return (
            f"{self.path}, {trained} training steps, {self.row['loops']} loops, "
            f"{steps_of(report, self.row)} sampling steps, guidance {self.row['guidance']:g}, "
            f"{report['num_samples']:,} samples, features of {report['feature_network']}."
        )


def count_in(name: str, kind: str) -> float:
    """Read the samples that a metric's name tells of: 2000 in fid2k; infinity in the plain name; 0 in other kinds."""
    parts = re.fullmatch(rf"{kind}(?:([\d.]+)(k?))?", name)
    if parts is None:
        return 0.0
    return math.inf if parts[1] is None else float(parts[1]) * (1000 if parts[2] else 1)


def find_result(row: Row, kind: str, runs: Path, table: Table) -> Result | None:
    """Find the best of what was measured of a row, over guidance scales as the paper does.

    A run, in the folder of its config's name, is the row's only where nothing sets it apart, see
    :func:`~elt_lightning.reproduce.sweeps.difference`; the table gets a note of each that is left out. For a table of
    small models any will do, a metric of any kind, and the most loops there are.
    """
    results = []
    for path in sorted((runs / str(row.name)).glob("test*/loops.json")):
        report = read_sweep(path)
        most = max(measured["loops"] for measured in report["rows"])
        loops = min(row.loops, most) if table.small_scale else row.loops
        found = [measured for measured in report["rows"] if measured["loops"] == loops]
        if found and not table.small_scale:
            reason = difference(report, [row])
            if reason is not None:
                table.notes.append(f"{row.model}: {path} is left out: {reason}.")
                continue
            alike = [measured for measured in drawn_alike(report, [row]) if measured["loops"] == loops]
            if len(alike) < len(found):
                unlike = len(found) - len(alike)
                table.notes.append(f"{row.model}: {path}: {unlike} of its rows are left out, drawn unlike the paper's.")
            found = alike
        for measured in found:
            names = [name for name, score in measured["metrics"].items() if not math.isnan(score["mean"])]
            names = sorted((name for name in names if count_in(name, kind)), key=lambda name: count_in(name, kind))
            others = [report["primary_metric"]] if table.small_scale else [None]
            results.append(Result(path, report, measured, (others + names)[-1]))
    return max(results, key=lambda result: result.goodness(kind), default=None)


def generation_table(number: int, rows: Sequence[Row], kind: str, runs: Path, small_scale: bool) -> Table:
    """Fill Table 1, 2 or 4, with a distance of a kind, "fid" or "fvd", from a folder of runs.

    At small scale these may be of other networks; what is counted is then of them.
    """
    scores = [kind, *(["inception_score"] if rows[0].inception_score else [])]
    table = Table(number, small_scale)
    for row in rows:
        printed = cells_of("paper", {name: getattr(row, name) for name in (*scores, *COUNTED[:2], "gflops")})
        cells = table.rows[row.model] = printed
        counted = count_row(row)
        if counted is None:
            continue
        result = find_result(row, kind, runs, table)
        if result is not None:
            cells |= cells_of("measured", result.values(kind, len(scores) > 1))
            table.notes.append(f"{row.model}: {result.note()}")
        if not small_scale:
            cells |= cells_of("counted", quantities(row, counted))
            table.notes += differences(row, counted)
        elif result is not None:
            cells |= cells_of(
                "counted",
                {name: result.row[name] for name in ("params_backbone", "params_total")}
                | {"gmacs_per_sample": result.row["macs_per_sample"] / 1e9},
            )
    filled = {column for cells in table.rows.values() for column in cells}
    kinds: tuple[Kind, ...] = ("paper", "measured", "counted")
    table.columns = [Column(score, kind) for score in scores for kind in kinds[:2]]
    table.columns += sorted(column for column in filled - {*table.columns} if column.kind == "measured")
    table.columns += [column for name in COUNTED for kind in kinds if (column := Column(name, kind)) in filled]
    table.notes.append("GMACs are 10⁹ multiply–accumulates of the whole network, attention products included.")
    return with_provenance(table)


def quantities(row: Row, counted: Count) -> dict[str, float | None]:
    """Return what needs no training by its columns."""
    return {
        "params_backbone": counted.params_backbone,
        "params_total": counted.params_total,
        "gmacs_per_pass": counted.forward_macs / 1e9,
        "gmacs_per_sample": counted.sample_macs / 1e9,
        "gflops": None if row.gflops is None else gflops_as_printed(row, counted),
        "depth": None if row.depth is None else counted.effective_depth,
    }


def differences(row: Row, counted: Count) -> list[str]:
    """Return where a count would not be printed as the paper prints it."""
    pairs = [("params", row.params, float(params_as_printed(row, counted)))]
    if row.gflops is not None:
        pairs.append(("gflops", row.gflops, gflops_as_printed(row, counted)))
    return [
        f"{row.model}: {shown(name, Value(ours))} {HEADINGS.get(name, 'parameters')} counted, {printed.text} printed "
        f"({100 * (ours / printed.value - 1):+.1f} %)."
        for name, printed, ours in pairs
        if not printed.agrees(ours)
    ]


def throughput_table(benchmarks: Path, small_scale: bool) -> Table:
    """Fill Table 3, from ``inference.json``: the paper's rows, then every other size that was measured."""
    speed, macs, params, baseline_params = "throughput ratio", "MACs ratio", "params_backbone", "params of the baseline"
    table = Table(3, small_scale, [Column(speed, "paper"), Column(speed, "measured")])
    table.columns += [Column("samples per second", "measured"), Column("share of peak", "measured")]
    table.columns += [Column(name, "counted") for name in (macs, params, baseline_params)]
    for row in TABLE_3:
        cells = table.rows[row.model] = cells_of("paper", {speed: row.ratio})
        if not small_scale:
            looped, baseline = count_scale(row.scale, row.num_layers, row.loops), count_scale(row.scale)
            sizes = {params: looped.params_backbone, baseline_params: baseline.params_backbone}
            cells |= cells_of("counted", {macs: looped.forward_macs / baseline.forward_macs, **sizes})
    printed = {(row.scale, row.num_layers, row.loops): row.model for row in TABLE_3}
    for run in benchmark_runs(benchmarks / "inference.json", table):
        for found in run["rows"]:
            ratio = speed_over_unlooped(found, run["rows"])
            if found["model"] != "looped" or found["loops"] == 1 or ratio is None:
                continue
            papers = printed.get((found["shape"], found["num_layers"], found["loops"]))
            as_papers = (found["batch_size"], found["steps"], found["guidance"], found["compile"])
            if as_papers != (TABLE_3_BATCH, TABLE_1[0].steps, 1, "no"):
                papers = None
            measured = {
                speed: Value(*ratio),
                "samples per second": found["samples_per_second"],
                "share of peak": found["pass_share_of_peak"],
            }
            row_of(table, found, run, papers).update(cells_of("measured", measured))
    return with_provenance(table)


def training_table(benchmarks: Path, small_scale: bool) -> Table:
    """Fill Table 8, from ``training.json``: the paper's row, then every other looped step that was measured."""
    flops, others = "FLOPs ratio", ("step time ratio", "peak memory ratio")
    table = Table(8, small_scale, [Column(flops, "paper"), Column(flops, "counted")])
    kinds: tuple[Kind, ...] = ("paper", "measured")
    table.columns += [Column(name, kind) for name in others for kind in kinds]
    table.columns += [Column("over vanilla, time ratio", "measured")]
    printed = zip((flops, *others), (TABLE_8.flops, TABLE_8.step_time, TABLE_8.peak_memory), strict=True)
    cells = cells_of("paper", dict(printed))
    rows = {row.name: row for row in TABLE_2}
    model, baseline = rows[TABLE_8.model], rows[TABLE_8.baseline]
    looped_count, baseline_count = count_row(model), count_row(baseline)
    if looped_count and baseline_count and not small_scale:
        cells |= cells_of("counted", {flops: looped_count.forward_macs / baseline_count.forward_macs})
    first = f"{model.model} / {baseline.model}"
    table.rows[first] = cells
    for run, found, unlooped in looped_steps(benchmarks / "training.json", table):
        is_papers = (found["shape"], found["num_layers"], found["loops"]) == ("wide", model.num_layers, model.loops)
        plain = found["way"] == "ilsd" and found["compile"] == "no" and not found["activation_checkpointing"]
        largest = max(other["batch_size"] for other in run["rows"] if other["shape"] == found["shape"])
        is_papers = is_papers and plain and found["batch_size"] == largest
        other = time_over(found, run["rows"], way="unlooped", activation_checkpointing=False)
        vanilla = time_over(found, run["rows"], way="vanilla") if found["way"] == "ilsd" else None
        measured = {
            "step time ratio": None if other is None else Value(*other),
            "over vanilla, time ratio": None if vanilla is None else Value(*vanilla),
            "peak memory ratio": found["peak_memory_bytes"] / unlooped["peak_memory_bytes"],
        }
        row_of(table, found, run, first if is_papers else None).update(cells_of("measured", measured))
    return with_provenance(table)


def looped_steps(path: Path, table: Table) -> Iterator[tuple[dict[str, Any], Measured, Measured]]:
    """Return every measured step of a looped model: its run, it, the unlooped one beside it."""
    for run in benchmark_runs(path, table):
        for row in run["rows"]:
            unlooped = find(run["rows"], row, TRAINING_KEYS, way="unlooped", activation_checkpointing=False)
            if row["way"] != "unlooped" and row["loops"] > 1 and unlooped is not None:
                yield run, row, unlooped


def row_of(table: Table, found: Measured, run: dict[str, Any], papers: str | None) -> Cells:
    """Return the cells that a measured row of a run fills: those of a row of the paper, or new ones under its own name.

    A row of the paper that it may be (None for none) is filled by the first run on an accelerator that has it in
    bfloat16, which is what these compute in, and a note says so; what comes after, or was measured in another precision
    or on a CPU, stands beside it.
    """
    name = benchmark_name(found, run["device"])
    is_free = papers is not None and not any(column.kind == "measured" for column in table.rows[papers])
    if papers is not None and is_free and found["precision"].startswith("bf16") and run["device_type"] != "cpu":
        table.notes.append(f"{papers} is measured as {name}.")
        return table.rows[papers]
    again = sum(other == name or other.startswith(f"{name}, run ") for other in table.rows)
    return table.rows.setdefault(f"{name}, run {again + 1}" if again else name, {})


def benchmark_name(row: Measured, device: str) -> str:
    """Call a measured row by all that sets it apart from others."""
    parts = [f"{row['shape']}: {row['num_layers']}N×{row['loops']}L", f"batch {row['batch_size']}", row["precision"]]
    parts += [f"{row['steps']} steps"] if "steps" in row else []
    parts += [f"guidance {row['guidance']:g}"] if row.get("guidance", 1) != 1 else []
    parts += [row["way"]] if "way" in row else []
    parts += ["torch.compile" if row["compile"] == "default" else row["compile"]] if row["compile"] != "no" else []
    parts += ["each loop recomputed"] if row.get("activation_checkpointing") else []
    return ", ".join([*parts, device])


def benchmark_runs(path: Path, table: Table) -> Iterator[dict[str, Any]]:
    """Read each run of a benchmark, and note its command; none where there is no file."""
    for run in read_runs(path):
        table.notes.append(
            f"Measured on {run['device']}: {path}, `{run['command']}`; ± is half of the quartiles' distance."
        )
        yield run


def with_provenance(table: Table) -> Table:
    """Add the table's own notes, and what its columns are."""
    table.notes += [] if table.small_scale else NOTES[table.number]
    configs = "the runs" if table.small_scale else "the configs"
    table.notes.append(
        f"paper: {PAPER}; counted: from {configs}; measured: here, empty where nothing was. "
        f"Made by `make table{table.number}{' SMOKE=1' if table.small_scale else ''}`."
    )
    return table


def write(number: int, measured: Path, benchmarks: Path, output: Path, small_scale: bool) -> None:
    """Write Table 1, 2, 3, 4 or 8 as Markdown, CSV and JSON.

    Tables 1, 2 and 4 are of the runs in ``measured``, the others of the JSON in ``benchmarks``. At small scale runs are
    of small networks, and the title is marked.
    """
    if number in (1, 2, 4):
        rows = {1: TABLE_1, 2: TABLE_2, 4: TABLE_4}[number]
        table = generation_table(number, rows, "fvd" if number == 4 else "fid", measured, small_scale)
    else:
        table = (throughput_table if number == 3 else training_table)(benchmarks, small_scale)
    table.write(output)

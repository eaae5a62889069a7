"""What the paper (arXiv 2604.09168v2) reports: its numbers stand here, and whatever shows one takes it from here.

A number is kept as it is printed: a table can then repeat it to the letter, and a count can be held against its last
digit. What was inferred or read second-hand is marked. Of Figures 1, 5, 8, 13 and 14 we have no printed number.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER = "arXiv 2604.09168v2"

_PRINTED = re.compile(r"~?(?P<digits>\d+(?:\.(?P<decimals>\d+))?)(?P<unit>[kMB×]?)(?:±(?P<spread>[\d.]+))?")
_UNITS = {"": 1.0, "×": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Printed:
    """A number as it is printed, for example "101M", "3.7k", "~1.7k", "96.4±2", "2.9×".

    Raises:
        ValueError: no such number.
    """

    text: str  # what is printed

    def __post_init__(self) -> None:
        self._parts()

    @property
    def value(self) -> float:
        """The number, its unit multiplied out."""
        parts = self._parts()
        return float(parts["digits"]) * _UNITS[parts["unit"]]

    @property
    def spread(self) -> float | None:
        """What stands behind "±", None where nothing does."""
        spread = self._parts()["spread"]
        return None if spread is None else float(spread)

    def agrees(self, value: float) -> bool:
        """Return whether ``value`` would be printed so: it is within half a unit of the last digit."""
        parts = self._parts()
        last_digit = _UNITS[parts["unit"]] * 10.0 ** -len(parts["decimals"] or "")
        return abs(value - self.value) <= 0.5 * last_digit

    def _parts(self) -> re.Match[str]:
        parts = _PRINTED.fullmatch(self.text)
        if parts is None:
            raise ValueError(f"{self.text!r} is not a number as the paper prints them")
        return parts


@dataclass(frozen=True)
class Row:
    """A row of Table 1, 2 or 4: a model, and what is printed of it."""

    table: int  # number of the table
    model: str  # the row, as it is called there
    name: str | None  # of our config, and of the folder of its runs; None for a model that this project does not build
    num_layers: int | None  # N; None where it is not known
    loops: int  # L, 1 without looping
    steps: int  # sampling steps
    params: Printed  # parameters. What it covers differs from row to row
    fid: Printed | None = None  # Fréchet inception distance
    fvd: Printed | None = None  # Fréchet video distance
    inception_score: Printed | None = None  # of images by Inception, of clips by C3D
    # 10⁹ multiply–accumulates of drawing a sample, as the counts show; the paper says FLOPs
    gflops: Printed | None = None
    depth: Printed | None = None  # D = N·L

    @property
    def config(self) -> Path:
        """The config of the model in this project."""
        return Path("configs", "ucf101" if self.table == 4 else "imagenet256", f"{self.name}.yaml")

    @property
    def place(self) -> str:
        """Where it is printed: table and row."""
        return f"Table {self.table}, {self.model}"


def _rows(table: int, printed: tuple[str, ...], *lines: tuple[Any, ...]) -> tuple[Row, ...]:
    """Build a table's rows of lines (model, name, N, L, steps, what is printed under each of ``printed``)."""
    rows = []
    for line in lines:
        numbers: dict[str, Any] = dict(zip(printed, map(Printed, line[5:]), strict=True))
        rows.append(Row(table, *line[:5], **numbers))
    return tuple(rows)


TABLE_1 = _rows(
    1,
    ("fid", "inception_score", "params", "gflops"),
    ("MaskGIT-L", "maskgit_l", 24, 1, 24, "2.1", "270.1", "303M", "3.7k"),
    ("MaskGIT-XL", "maskgit_xl", 28, 1, 24, "2.0", "294.8", "446M", "3.9k"),
    ("ELT-L 8N×3L", "elt_l_8n3l", 8, 3, 24, "2.2", "254.3", "101M", "3.7k"),
    ("ELT-L 12N×2L", "elt_l_12n2l", 12, 2, 24, "2.1", "281.8", "152M", "3.7k"),
    ("ELT-XL 7N×4L", "elt_xl_7n4l", 7, 4, 24, "2.0", "266.1", "111M", "3.9k"),
)
"""ImageNet 256×256, masked generation."""

TABLE_2 = _rows(
    2,
    ("fid", "params", "depth"),
    ("DiT 16 layers", "dit_16", 16, 1, 512, "3.87", "1.1B", "16"),
    ("DiT 32 layers", "dit_32", 32, 1, 512, "3.43", "2.1B", "32"),
    ("ELT 1N×32L", "elt_1n32l", 1, 32, 512, "10.30", "69M", "32"),
    ("ELT 4N×8L", "elt_4n8l", 4, 8, 512, "3.96", "271M", "32"),
    ("ELT 8N×4L", "elt_8n4l", 8, 4, 512, "3.16", "539M", "32"),
    ("ELT 16N×2L", "elt_16n2l", 16, 2, 512, "2.83", "1.1B", "32"),
)
"""ImageNet 256×256, diffusion."""

TABLE_4 = _rows(
    4,
    ("fvd", "inception_score", "params", "gflops"),
    ("MaGNeTS", None, None, 1, 12, "96.4±2", "88.53±0.20", "306M", "~1.7k"),
    ("MAGVIT-L", "magvit_l", 24, 1, 12, "76±2", "89.27±0.15", "306M", "~4.3k"),
    ("ELT 6N×4L", "elt_6n4l", 6, 4, 12, "72.8±2.5", "88.27±0.33", "76M", "~4.3k"),
    ("ELT 6N×6L", "elt_6n4l", 6, 6, 24, "60.8±2.7", "87.88±0.39", "76M", "~13k"),
)
"""UCF-101, class-conditional. The last row is read as the model of the row above, run at more loops and steps (inferred
from Figure 7)."""


@dataclass(frozen=True)
class Throughput:
    """A row of Table 3: inference against the unlooped baseline of the same scale, batch 8, one TPU v6e."""

    scale: str  # named size
    num_layers: int  # N of the best ELT
    loops: int  # L of the best ELT
    ratio: Printed  # samples per second of ELT over those of the baseline

    @property
    def model(self) -> str:
        """The row."""
        return f"{self.scale}: {self.num_layers}N×{self.loops}L"


TABLE_3_BATCH = 8
TABLE_3 = (
    Throughput("B", 6, 2, Printed("1.0×")),
    Throughput("L", 8, 3, Printed("2.9×")),
    Throughput("XL", 7, 4, Printed("3.3×")),
    Throughput("H", 8, 4, Printed("3.5×")),
)


@dataclass(frozen=True)
class TrainingProfile:
    """Table 8: a training step of one model over that of another, on TPU v6e."""

    model: str  # name of the looped model's config
    baseline: str  # name of the unlooped model's config
    flops: Printed  # of a step; the paper calls them the same
    step_time: Printed  # the paper calls it the same
    peak_memory: Printed  # the paper calls it 34 % less


TABLE_8 = TrainingProfile("elt_8n4l", "dit_32", Printed("1×"), Printed("1×"), Printed("0.66×"))


@dataclass(frozen=True)
class ParetoFit:
    """Figure 4's front, FID = factor·G^exponent + floor with G the GFLOPs of a sample; a second-hand fit."""

    factor: float
    exponent: float
    floor: float

    def fid(self, gflops: float) -> float:
        """Return the FID at a compute of ``gflops`` for each sample, counted as in :attr:`Row.gflops`."""
        return self.factor * gflops**self.exponent + self.floor


FIGURE_4 = ParetoFit(1922.5, -0.95, 1.48)

FIGURE_6 = {"elt_16n2l": Printed("2×"), "elt_8n4l": Printed("1.4×")}
"""How much sooner in training each model reaches the FID of the 32-layer DiT."""


@dataclass(frozen=True)
class BestLoops:
    """Figure 7: FVD is best at more loops than in training."""

    train_loops: int  # L_max
    loops: int  # L of the best FVD
    fvd: Printed  # there


FIGURE_7 = BestLoops(train_loops=4, loops=6, fvd=Printed("69.2"))

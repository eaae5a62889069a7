"""Times side by side: every contender takes its turn in every round, so that a machine's drift affects all of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from elt_lightning.bench.shapes import Compiled
from elt_lightning.training.precision import PRECISIONS, Types

Work = Callable[[], object]

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices whose product is this machine's peak; the fastest counts."""

LONG_ENOUGH = 0.25
"""Seconds of a product from which larger ones are left out: some CPUs take a hundred times as long in bfloat16."""


@dataclass(frozen=True)
class Settings:
    """What measuring networks has in common."""

    loops: Sequence[int]  # loop counts; of training L_max, one after the other
    batch_sizes: Sequence[int]  # samples at once
    compile: Sequence[Compiled]  # "no", and modes of `torch.compile`
    precision: str  # Lightning's name of it
    rounds: int  # turns of every contender
    turn_seconds: float  # the least that a turn takes
    device: torch.device  # where

    @property
    def types(self) -> Types:
        """What the precision means."""
        return PRECISIONS[self.precision]

    def time(self, contenders: Mapping[Any, Work]) -> tuple[dict[Any, "Times"], float]:
        """Time contenders in turns, and matrix products with them: times, and the fastest product's operations/s."""
        products = matmuls(self.device, self.types.products)
        times = SideBySide(self.device, self.rounds, self.turn_seconds).time({**contenders, **products})
        return times, max(2 * side**3 / times[side].median for side in products)


@dataclass
class Times:
    """How long one contender takes."""

    first: float  # seconds of the very first call, compilation included
    seconds: list[float] = field(default_factory=list)  # of a call, in each round

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return median(self.seconds)


def half_spread(values: list[float]) -> float:
    """Half of the distance between the quartiles; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


class SideBySide:
    """Times contenders in turns: each has ``rounds`` of at least ``shortest`` seconds; fast ones have several calls.

    The device is waited for before a clock is read.
    """

    def __init__(self, device: torch.device, rounds: int, shortest: float) -> None:
        self.device, self.rounds, self.shortest = device, rounds, shortest

    def time(self, contenders: Mapping[Any, Work]) -> dict[Any, Times]:
        """Call each twice to warm it up, then time all of them in every round, in turns forwards and backwards."""
        times = {key: Times(self.seconds(work)) for key, work in contenders.items()}
        calls = {key: max(1, math.ceil(self.shortest / self.seconds(work))) for key, work in contenders.items()}
        order = list(contenders)
        for _ in range(self.rounds):
            for key in order:
                times[key].seconds.append(self.seconds(contenders[key], calls[key]))
            order.reverse()
        return times

    def seconds(self, work: Work, calls: int = 1) -> float:
        """Time calls in a row; return the seconds of one."""
        self._wait()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        self._wait()
        return (time.perf_counter() - began) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matmuls(device: torch.device, dtype: torch.dtype) -> dict[int, Work]:
    """Return square matrix products by the side of their matrices: contenders that no network can beat."""

    def product(side: int) -> Work:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out: Tensor = torch.empty_like(left)
        return partial(torch.mm, left, right, out=out)

    products: dict[int, Work] = {}
    for side in MATMUL_SIZES.get(device.type, (1024,)):
        products[side] = product(side)
        if SideBySide(device, rounds=1, shortest=0).seconds(products[side]) > LONG_ENOUGH:
            break
    return products

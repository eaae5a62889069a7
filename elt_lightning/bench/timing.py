"""Times side by side: every contender takes its turn in every round, so that a machine's drift meets all of them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices whose product is this machine's peak; the fastest counts."""

LONG_ENOUGH = 0.25
"""Seconds of a product from which larger ones are left out: some CPUs take a hundred times as long in bfloat16."""


@dataclass
class Times:
    """How long one contender takes.

    Attributes:
        first: seconds of the very first call, compilation included.
        seconds: of a call, in each round.
    """

    first: float
    seconds: list[float] = field(default_factory=list)

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
    """Times contenders in turns.

    Args:
        device: where they work; it is waited for before a clock is read.
        rounds: how often each has its turn.
        shortest: seconds of a turn at least; what is faster is called several times in it.
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
        """Time calls in a row, and give the seconds of one."""
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
    """Give square matrix products by the side of their matrices: contenders that no network can beat."""

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


def peak_flops(times: Mapping[int, Times]) -> float:
    """Floating-point operations per second of the fastest product, by its median."""
    return max(2 * side**3 / measured.median for side, measured in times.items())

"""How many loops samples ran where a tolerance ends each sample's loop: counted over all ranks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class Spread(NamedTuple):
    """Mean and quantiles of loops, one for each row that was counted."""

    mean: list[float]
    quantiles: dict[str, list[float]]  # {name of QUANTILES: values}


class SpentLoops(Metric):
    """Counts the loops that samples ran, in halves: of two branches of guidance it is the mean.

    Args:
        most: loops that each of K steps may run.
    """

    full_state_update = False
    per_step: Tensor
    per_sample: Tensor

    def __init__(self, most: list[int]) -> None:
        super().__init__()
        self.add_state("per_step", torch.zeros(len(most), 2 * max(most) + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("per_sample", torch.zeros(1, 2 * sum(most) + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loops: Tensor) -> None:
        """Take in the loops (B, K) of samples at each step."""
        halves = (2 * loops).round().long()
        for counts, rows in ((self.per_step, halves.T), (self.per_sample, halves.sum(1)[None])):
            counts.scatter_add_(1, rows, torch.ones_like(rows))

    def compute(self) -> tuple[Spread, Spread]:
        """Return the loops of each step, and the mean loops of a step of each sample, over all samples."""
        num_steps = len(self.per_step)
        return spread(self.per_step.cpu(), 2.0), spread(self.per_sample.cpu(), 2.0 * num_steps)


def spread(counts: Tensor, unit: float) -> Spread:
    """Summarise histograms (n, bins), whose bin i counts values of i/unit."""
    values, total = torch.arange(counts.shape[1]) / unit, counts.sum(1, keepdim=True)
    reached = counts.cumsum(1)
    quantiles = {name: values[(reached < (share * total).ceil()).sum(1)].tolist() for name, share in QUANTILES.items()}
    return Spread(((counts * values.double()).sum(1) / total[:, 0]).tolist(), quantiles)


def in_brief(spread: Spread) -> str:
    """Write the mean of a spread's first row, and between what 80 % of its values lie."""
    low, high = (spread.quantiles[name][0] for name in ("p10", "p90"))
    return f"{spread.mean[0]:.3g} ({low:.3g} to {high:.3g})"

"""What a metric of generated samples offers."""

import re
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torchmetrics import Metric


class SampleMetric(Metric):
    """Judges generated pictures. Sums its states over ranks, as every torchmetrics Metric does.

    Attributes:
        feature_network: name of the network whose features are compared, None for exact scores.
    """

    feature_network: str | None = None
    full_state_update = False

    @abstractmethod
    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """Take in pixels (B, C, H, W) float in [0, 1] and the classes (B,) that were asked for."""

    def correct(self, pixels: Tensor, labels: Tensor) -> Tensor | None:
        """Return for each picture whether it is right, (B,) bool, where a single one can be; None otherwise."""
        return None

    def diversity(self) -> "list[SampleMetric]":
        """Return further metrics, which judge how varied the same samples are; none where that cannot be told."""
        return []

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return the named scores of all that was taken in."""


def scored_as(metric: str, names: Sequence[str]) -> str:
    """Find a metric among scores whose names may carry a number of samples: ``fid`` is found as ``fid2k``.

    Raises:
        ValueError: none of the names is of this metric.
    """
    pattern = re.compile(rf"{re.escape(metric)}([\d.]+k?)?")
    for name in names:
        if pattern.fullmatch(name):
            return name
    raise ValueError(f"there is no score {metric} among {', '.join(names)}")

"""What a metric of generated samples offers."""

from abc import abstractmethod

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
        """Say of each picture whether it is right, (B,) bool, where a single one can be; None otherwise."""
        return None

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Give the named scores of all that was taken in."""

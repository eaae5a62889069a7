"""Whether samples are as varied as real pictures: precision, recall and coverage over the features of a network.

A set's manifold is the union of balls around its members, each reaching to the member's k-th nearest neighbour in it.
Precision is the share of samples on the manifold of the real pictures, recall the share of real pictures on that of the
samples (Kynkäänniemi et al. 2019, arXiv 1904.06991); coverage is the share of real pictures in whose ball a sample lies
(Naeem et al. 2020, arXiv 2002.09797), which outliers among the samples cannot raise.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from elt_lightning.metrics.base import SampleMetric

NEIGHBOURS = 5
"""k, as in Naeem et al."""


class Diversity(SampleMetric):
    """``precision``, ``recall`` and ``coverage`` of samples against the features of real pictures.

    Args:
        network: whose features are compared; it moves to the samples' device with the metric.
        features: maps pixels (B, …) in [0, 1] to (B, D).
        real: (n, D) features of the real pictures, n > 5.
        feature_network: the network's name, for reports.
    """

    seen: list[Tensor] | Tensor

    def __init__(
        self, network: nn.Module, features: Callable[[Tensor], Tensor], real: Tensor, feature_network: str | None
    ) -> None:
        super().__init__()
        self.network, self.features, self.real, self.feature_network = network, features, real, feature_network
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, pixels: Tensor, labels: Tensor) -> None:  # noqa: D102
        assert isinstance(self.seen, list)
        self.seen.append(self.features(pixels).double())

    def compute(self) -> dict[str, Tensor]:
        """Return the three scores (ValueError: there are fewer samples or real pictures than neighbours)."""
        seen = torch.cat(self.seen) if isinstance(self.seen, list) else self.seen
        return manifold_scores(self.real.to(seen), seen)


def manifold_scores(real: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, Tensor]:
    """Compare real features (n, D) with those of samples (m, D): ``precision``, ``recall``, ``coverage`` in [0, 1].

    Raises:
        ValueError: n or m is not above the number of neighbours.
    """
    if min(len(real), len(samples)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures of both kinds")
    apart = torch.cdist(real, samples)  # n m
    real_radius, sample_radius = _radius(real, neighbours), _radius(samples, neighbours)
    return {
        "precision": (apart <= real_radius[:, None]).any(0).double().mean(),
        "recall": (apart <= sample_radius).any(1).double().mean(),
        "coverage": (apart <= real_radius[:, None]).any(1).double().mean(),
    }


def _radius(points: Tensor, neighbours: int) -> Tensor:
    """Return for each point (n, D) the distance to its k-th nearest neighbour, itself not counted: (n,)."""
    return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values

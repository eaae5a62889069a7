"""Fréchet distance between two sets of features, each summed up by its mean and covariance.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)      (Dowson and Landau 1982; Heusel et al. 2017)

It is called FID only over Inception features and FVD only over I3D features; any other network has its own name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor

from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.diversity import Diversity
from elt_lightning.metrics.moments import Moments, MomentSums
from elt_lightning.metrics.small_networks import FeatureNetwork


def frechet_distance(first: Moments, second: Moments) -> Tensor:
    """Return d² between two Gaussians, in float64.

    tr (Σ₁Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric, so that rounding
    never makes it complex; eigenvalues that rounding put below zero count as zero.
    """
    product = first.root @ second.covariance @ first.root
    trace_of_root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    squared_difference = (first.mean - second.mean).square().sum()
    return squared_difference + first.covariance.trace() + second.covariance.trace() - 2 * trace_of_root


class SummingMetric(SampleMetric):
    """A metric of sums, over which ranks add up; they and its networks keep their precision on every device."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, type] = {}

    def add_sums(self, name: str, zeros: Any) -> None:
        """Keep a record of sums, such as :class:`MomentSums`, as states; :meth:`sums` returns it as it is now."""
        self._kinds[name] = type(zeros)
        for state, value in vars(zeros).items():
            self.add_state(f"{name}_{state}", value, dist_reduce_fx="sum")

    def sums(self, name: str) -> Any:
        """Return a record of sums; adding to it adds to the states."""
        kind = self._kinds[name]
        return kind(*(getattr(self, f"{name}_{field.name}") for field in fields(kind)))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Self:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)  # type: ignore[return-value]


class FrechetDistance(SummingMetric):
    """Streamed Fréchet distance between samples and fixed reference moments.

    Args:
        name: of the score, for example ``fd_digits``.
        network: whose features are compared; as a part of the metric it moves to the samples' device with it.
        title: the network's name, for reports.
        features: maps pixels (B, …) in [0, 1] to (B, D), D the network's ``num_features``, where that is not the
            network itself.
    """

    def __init__(
        self, name: str, network: FeatureNetwork, title: str, features: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.name, self.network, self.feature_network = name, network, title
        self.features = features or network.features
        self.reference: Moments | None = None
        self.num_features = network.num_features
        self.real = torch.empty(0, self.num_features)
        self.add_sums("features", MomentSums.zeros(self.num_features))

    def set_reference(self, batches: Iterable[Tensor]) -> None:
        """Take the reference moments from real pixels, batch by batch; their features are kept."""
        features = [self.features(pixels) for pixels in batches]
        sums = MomentSums.zeros(self.num_features)
        for part in features:
            sums.add(part)
        self.reference, self.real = sums.moments(), torch.cat(features)

    def diversity(self) -> list[SampleMetric]:
        """Judge the variety of samples by the same features, where real pictures were the reference."""
        known = len(self.real) > 0
        return [Diversity(self.network, self.features, self.real, self.feature_network)] if known else []

    def update(self, pixels: Tensor, labels: Tensor) -> None:  # noqa: D102
        features = self.features(pixels)
        expected = (len(pixels), self.num_features)
        if features.shape != expected:
            raise ValueError(f"the feature network of {self.name} gave {tuple(features.shape)}, not {expected}")
        self.sums("features").add(features)

    def moments(self) -> Moments:
        """Return mean and covariance of what was taken in; see :meth:`MomentSums.moments`."""
        return self.sums("features").moments()

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        if self.reference is None:
            raise ValueError(f"{self.name} has no reference: call set_reference first")
        moments = self.moments()
        return {self.name: frechet_distance(moments, self.reference.to(moments.mean.device)).clamp(min=0)}

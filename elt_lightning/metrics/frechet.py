"""Fréchet distance between two sets of features, each summed up by its mean and covariance.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)      (Dowson and Landau 1982; Heusel et al. 2017)

It is called FID only over Inception features and FVD only over I3D features; any other network has its own name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.diversity import Diversity


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device) -> "Moments":
        """Return the same moments on another device; on the same one, this object with its cached root."""
        if self.mean.device == device:
            return self
        return Moments(self.mean.to(device), self.covariance.to(device))

    @cached_property
    def root(self) -> Tensor:
        """Σ^½ (D, D), with eigenvalues that rounding put below zero taken as zero; computed once, for all distances."""
        eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance)
        return (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T


@dataclass(frozen=True)
class MomentSums:
    """Sums from which moments are made. They are float64, so that batches and ranks merge exactly up to rounding."""

    total: Tensor  # (D,) float64, the sum of the features
    total_outer: Tensor  # (D, D) float64, the sum of their outer products
    count: Tensor  # () int64, how many there were

    @classmethod
    def zeros(cls, num_features: int, device: torch.device | None = None) -> "MomentSums":
        """Begin with nothing taken in."""
        return cls(
            torch.zeros(num_features, dtype=torch.float64, device=device),
            torch.zeros(num_features, num_features, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    def add(self, features: Tensor) -> None:
        """Take in features (B, D), in place."""
        features = features.to(self.total.device).to(self.total.dtype)  # in this order: not every device has float64
        self.total.add_(features.sum(0))
        self.total_outer.add_(features.T @ features)
        self.count.add_(len(features))

    def moments(self) -> Moments:
        """Return mean and covariance of what was taken in (ValueError: fewer than two samples)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {int(self.count)}")
        mean = self.total / self.count
        return Moments(mean, (self.total_outer - self.count * mean.outer(mean)) / (self.count - 1))


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
        features: maps pixels (B, C, H, W) in [0, 1] to (B, D).
        num_features: D.
        feature_network: the network's name, for reports.
    """

    def __init__(
        self, name: str, features: Callable[[Tensor], Tensor], num_features: int, feature_network: str
    ) -> None:
        super().__init__()
        self.name, self.features, self.feature_network = name, features, feature_network
        self.reference: Moments | None = None
        self.real = torch.empty(0, num_features)
        self.num_features = num_features
        self.add_sums("features", MomentSums.zeros(num_features))

    def set_reference(self, batches: Iterable[Tensor]) -> None:
        """Take the reference moments from real pixels, batch by batch; their features are kept."""
        features = [self.features(pixels) for pixels in batches]
        sums = MomentSums.zeros(self.num_features)
        for part in features:
            sums.add(part)
        self.reference, self.real = sums.moments(), torch.cat(features)

    def diversity(self) -> list[SampleMetric]:
        """Judge the variety of samples by the same features, where real pictures were the reference."""
        if not len(self.real):
            return []
        diversity = Diversity(self.features, self.real, self.feature_network)
        if isinstance(network := getattr(self, "network", None), torch.nn.Module):
            diversity.network = network  # moves to the samples' device with the metric
        return [diversity]

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

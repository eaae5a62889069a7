"""Mean and covariance of features, which Fréchet distances compare."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU in place of Apple's GPUs, which lack float64."""
    return torch.device("cpu") if device.type == "mps" else device


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

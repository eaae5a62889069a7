"""The Inception score, from sums: mean over splits of exp(mean KL(p‖p̄)), p the class probabilities of a sample.

Source: "Improved techniques for training GANs", T. Salimans et al., 2016.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreSums:
    """Sums for each split. They are float64, so that batches and ranks merge exactly up to rounding."""

    probabilities: Tensor  # (S, C) float64, class probabilities added up
    entropies: Tensor  # (S,) float64, entropies of the class probabilities of each sample, added up
    counts: Tensor  # (S,) int64, how many samples there were

    @classmethod
    def zeros(cls, num_splits: int, num_classes: int) -> "ScoreSums":
        """Begin with nothing taken in."""
        return cls(
            torch.zeros(num_splits, num_classes, dtype=torch.float64),
            torch.zeros(num_splits, dtype=torch.float64),
            torch.zeros(num_splits, dtype=torch.int64),
        )

    def add(self, probabilities: Tensor, splits: Tensor) -> None:
        """Take in class probabilities (B, C) of samples and the split (B,) int64 of each, in place."""
        probabilities = probabilities.to(self.probabilities.device).to(self.probabilities.dtype)
        self.probabilities.index_add_(0, splits, probabilities)
        self.entropies.index_add_(0, splits, -torch.special.xlogy(probabilities, probabilities).sum(1))
        self.counts.index_add_(0, splits, torch.ones_like(splits))

    def score(self) -> Tensor:
        """Return the mean over the splits that hold samples; mean KL(p‖p̄) = H(p̄) − mean H(p)."""
        used = self.counts > 0
        counts = self.counts[used]
        mean = self.probabilities[used] / counts[:, None]
        divergence = -torch.special.xlogy(mean, mean).sum(1) - self.entropies[used] / counts
        return divergence.exp().mean()

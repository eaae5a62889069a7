"""A small convolutional network that reads one handwritten digit, and the scores built on it.

It plays the part that Inception plays for FID. A distance over its features is called ``fd_digits``, never FID.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.handwriting import SIDE, load_handwriting
from elt_lightning.metrics.small_networks import FeatureNetwork, fit, load_or_train

MADE = "the digit network, which reads {:.1%} of the held-out digits"


class DigitNetwork(FeatureNetwork):
    """Read a digit: (n, 1, 8, 8) float in [0, 1] to logits (n, 10); 64 features stand before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 2) ** 2, self.num_features),
            nn.GELU(),
        )
        self.classifier = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the features before the last layer: (n, 1, 8, 8) to (n, 64)."""
        return self.convolutions(images)


def load_digit_network(root: Path) -> DigitNetwork:
    """Load the network from its cache in a folder, or train it once, seeded, in a few seconds, and write the cache."""
    path = root / "digit_network.safetensors"
    return load_or_train(DigitNetwork(), path, train_digit_network, load_handwriting, MADE)


def train_digit_network(network: DigitNetwork, images: Tensor, labels: Tensor) -> None:
    """Fit the network to digits shifted by up to one pixel."""
    padded = F.pad(images, (1, 1, 1, 1))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(padded), (128,), generator=generator)
        top, left = torch.randint(3, (2,), generator=generator).tolist()
        return padded[chosen, :, top : top + SIDE, left : left + SIDE], labels[chosen]

    fit(network, draw, steps=800, learning_rate=2e-3)


class RecognisedShare(SampleMetric):
    """``recognised``: the share of samples that a network reads as the class that was asked for.

    Args:
        network: maps pixels (B, …) float in [0, 1] to logits (B, classes).
    """

    right: Tensor
    count: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pixels: Tensor, labels: Tensor) -> None:  # noqa: D102
        self.right += self.correct(pixels, labels).sum()
        self.count += len(labels)

    def correct(self, pixels: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return self.network(pixels).argmax(1) == labels

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        return {"recognised": self.right / self.count}

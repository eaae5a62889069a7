"""A small convolutional network that names the class of a small picture.

It plays the part that Inception plays for FID. A distance over its features is called after the data, never FID.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.metrics.small_networks import FeatureNetwork, fit, load_or_train

SIDE = 28
"""Height and width that the network reads; other pictures are averaged, or their pixels repeated, to it."""

AT_ONCE = 500
"""Pictures in one forward pass, which bounds memory; it does not change results."""


class PictureNetwork(FeatureNetwork):
    """Name a class: pictures (n, 1 or 3, H, W) float in [0, 1] to logits; 64 features stand before the last layer.

    Colours are averaged to grey.

    Args:
        num_classes: how many there are.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 4) ** 2, self.num_features),
            nn.GELU(),
        )
        self.classifier = nn.Linear(self.num_features, num_classes)

    def features(self, pictures: Tensor) -> Tensor:
        """Return the features before the last layer: (n, 1 or 3, H, W) to (n, 64)."""
        grey = F.adaptive_avg_pool2d(pictures.float().mean(1, keepdim=True), SIDE)
        return torch.cat([self.convolutions(part) for part in grey.split(AT_ONCE)])


def load_or_train_picture_network(
    path: Path, training: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_classes: int
) -> PictureNetwork:
    """Load the network from its cache, or train it once, seeded, in some minutes, and write the cache.

    Args:
        path: the cached file; give another one for other pictures.
        training: pictures (n, H, W) uint8 and their classes (n,).
        val: held-out ones, which test how well the network reads.
        num_classes: how many there are.
    """
    halves = training, (val[0][:, None] / 255, val[1])
    made = "the picture network, which reads {:.1%} of the held-out pictures"
    return load_or_train(PictureNetwork(num_classes), path, train_picture_network, halves.__getitem__, made)


def train_picture_network(network: PictureNetwork, images: Tensor, labels: Tensor) -> None:
    """Fit the network to pictures (n, H, W) uint8, shifted by up to one pixel, in six passes over 60,000 of them."""
    height, width = images.shape[1:]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (128,), generator=generator)
        top, left = torch.randint(3, (2,), generator=generator).tolist()
        padded = F.pad(images[chosen, None] / 255, (1, 1, 1, 1))
        return padded[..., top : top + height, left : left + width], labels[chosen]

    fit(network, draw, min(max(len(images) // 20, 200), 3000), learning_rate=2e-3)

"""A small 3-D convolutional network that names the motion in a short clip, and the scores built on it.

It plays the part that I3D plays for FVD. A distance over its features is called ``fd_motion``, never FVD.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.digits import RecognisedShare
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.small_networks import FeatureNetwork, fit, load_or_train

SIDE = 32
"""Height and width that the network reads; larger clips are averaged down to it, pixels of smaller ones repeated."""

LEAST_CONTRAST = 0.02
"""Added to the deviation of a clip's pixels, so that an empty clip stays empty."""

AT_ONCE = 64
"""Clips in one forward pass, which bounds memory; it does not change results."""

BLURS = ((1, 1), (1, 3), (1, 5), (3, 5))
"""How clips are blurred in training: averages over a number of frames, and of pixels along height and width."""


class MotionNetwork(FeatureNetwork):
    """Name a motion: clips (n, 1 or 3, F, H, W) to logits (n, 10); 64 features stand before the last layer.

    Clips are float in [0, 1] or bytes, of 8 … 16 frames of 16 … 64 pixels a side; colours are averaged to grey.
    """

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv3d(1, 16, 3, stride=(1, 2, 2), padding=1),
            nn.GELU(),
            nn.Conv3d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv3d(32, 64, 3, stride=(1, 2, 2), padding=1),
            nn.GELU(),
            nn.Conv3d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(64, self.num_features),
            nn.GELU(),
        )
        self.classifier = nn.Linear(self.num_features, self.num_classes)

    def features(self, clips: Tensor) -> Tensor:
        """Return the features before the last layer: (n, 1 or 3, F, H, W) to (n, 64)."""
        parts = [self.convolutions(_grey(part)) for part in clips.split(AT_ONCE)]
        return torch.cat(parts)


def _grey(clips: Tensor) -> Tensor:
    """Turn clips into what the network reads: (n, 1, F, 32, 32) float, of mean 0 and deviation 1 in each clip.

    Brightness and contrast say nothing about motion, and where they differ the network learns slowly.
    """
    pixels = clips / 255 if clips.dtype == torch.uint8 else clips.float()
    small = F.adaptive_avg_pool3d(pixels.mean(1, keepdim=True), (clips.shape[2], SIDE, SIDE))
    centred = small - small.mean((1, 2, 3, 4), keepdim=True)
    return centred / (centred.square().mean((1, 2, 3, 4), keepdim=True).sqrt() + LEAST_CONTRAST)


def load_or_train_motion_network(
    path: Path, clips: Tensor, labels: Tensor, val_clips: Tensor, val_labels: Tensor
) -> MotionNetwork:
    """Load the network from its cache, or train it once, seeded, in half a minute, and write the cache.

    Clips are (n, 1 or 3, F, H, W) uint8 or float in [0, 1], labels (n,) int64 in [0, 10) their motions; held-out ones
    test how well the network reads. Other clips take another ``path``.
    """
    halves = (clips, labels), (val_clips, val_labels)
    made = "the motion network, which reads {:.1%} of the held-out clips"
    return load_or_train(MotionNetwork(), path, train_motion_network, halves.__getitem__, made)


def train_motion_network(
    network: MotionNetwork, clips: Tensor, labels: Tensor, steps: int = 300, seed: int = 0
) -> None:
    """Fit the network to clips in batches of 32, three in four of them blurred; random numbers are from ``seed``."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(clips), (32,), generator=generator)
        return blurred(clips[chosen], torch.randint(len(BLURS), (32,), generator=generator)), labels[chosen]

    fit(network, draw, steps, learning_rate=3e-3, seed=seed)


def blurred(clips: Tensor, strength: Tensor) -> Tensor:
    """Blur clips, since tokenizers do: a network that has seen sharp ones alone takes a blurred circle for anything.

    Clips (n, C, F, H, W) uint8 or float in [0, 1] become floats; ``strength`` (n,) is which of :data:`BLURS` each gets.
    """
    pixels = clips / 255 if clips.dtype == torch.uint8 else clips.clone()
    for number, (frames, side) in enumerate(BLURS):
        chosen = strength == number
        edges = (side // 2,) * 4 + (frames // 2,) * 2
        padded = F.pad(pixels[chosen], edges, mode="replicate")
        pixels[chosen] = F.avg_pool3d(padded, (frames, side, side), stride=1)
    return pixels


def motion_metrics(network: MotionNetwork, real: Iterable[Tensor]) -> list[SampleMetric]:
    """Build ``recognised``, and ``fd_motion`` against real clips: batches of (B, 1 or 3, F, H, W)."""
    distance = FrechetDistance("fd_motion", network, "motion_network")
    distance.set_reference(real)
    return [RecognisedShare(network), distance]

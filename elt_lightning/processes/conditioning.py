"""What a network is told besides its input: the class, and for diffusion the time."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elt_lightning.processes.noise import Stream, uniform


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on. The null class of classifier-free guidance is ``num_classes``."""

    labels: Tensor  # (B,) int64 in [0, num_classes]
    time: Tensor | None = None  # (B,) float in [0, 1] for diffusion, None for masked generation

    def with_labels(self, labels: Tensor) -> "Condition":
        """Return the same condition with other labels."""
        return replace(self, labels=labels)

    def rows(self, places: Tensor) -> "Condition":
        """Return the condition of the samples at these places (b,) of the batch."""
        return Condition(self.labels[places], None if self.time is None else self.time[places])

    def joined(self, other: "Condition") -> "Condition":
        """Put two conditions one after the other along the batch."""
        time = None if self.time is None or other.time is None else torch.cat([self.time, other.time])
        return Condition(torch.cat([self.labels, other.labels]), time)


def drop_labels(labels: Tensor, seeds: Tensor, step: int, probability: float, num_classes: int) -> Tensor:
    """Replace each label by the null class with some probability, so that one network learns both guidance branches.

    Args:
        labels: (B,) int64 in [0, num_classes).
        seeds: (B,) int64 per-sample seeds.
        step: training step.
        probability: share of labels dropped; 0.1 in the paper for ImageNet, 0 for UCF-101.
        num_classes: the null class.

    Returns:
        (B,) int64 in [0, num_classes].
    """
    if probability == 0.0:
        return labels
    dropped = uniform(seeds, step, Stream.LABEL_DROP) < probability
    return torch.where(dropped, num_classes, labels)

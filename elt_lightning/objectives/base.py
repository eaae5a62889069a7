"""What ILSD asks of an objective."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from elt_lightning.processes.base import Process


@dataclass(frozen=True)
class Corrupted:
    """A corrupted batch, with what is needed to judge a prediction."""

    inputs: Tensor  # what the network sees: tokens (B, T) or noisy latents (B, C, H, W)
    target: Tensor  # what it should find, in the same shape
    # for masked generation, (B, T) in {0, 1}: the positions that count; for diffusion, (B,) weights of the squared
    # error of what the network predicts
    weight: Tensor
    time: Tensor | None = None  # (B,) times of diffusion, None for masked generation


class Objective(ABC):
    """Corrupts a batch and scores predictions; a loss is one number per sample, and the caller averages the batch.

    Args:
        process: the model's.
    """

    def __init__(self, process: Process) -> None:
        self.process = process

    @abstractmethod
    def corrupt(self, x: Tensor, seeds: Tensor, step: int) -> Corrupted:
        """Corrupt clean data x (B, …) with noise that depends on the per-sample seeds (B,) and the step alone."""

    @abstractmethod
    def ground_truth(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """Return L_GT of the paper: (B,) losses of a prediction against the data."""

    @abstractmethod
    def distillation(self, student: Tensor, teacher: Tensor, corrupted: Corrupted) -> Tensor:
        """Return L_dist of the paper: (B,) losses of the student against the teacher, which is detached here."""

"""Flow matching: a straight path from data to noise, and the velocity along it, as in Looped-DiT (arXiv 2609.40305)."""

import torch
from torch import Tensor

from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.processes.base import check_process
from elt_lightning.processes.gaussian import GaussianProcess, add_noise, predicted, weighted_square_error
from elt_lightning.processes.noise import Stream, normal


class FlowMatchingObjective(Objective):
    """Squared error of the velocity u = ε − x on z = (1 − σ)·x + σ·ε, at logit-normal times t; σ is t but for a margin.

    t = sigmoid(mean + std·n), n standard normal. Source: Lipman et al. 2023; Esser et al. 2024 (arXiv 2403.03206),
    where, as here, time 1 is noise.

    Args:
        process: a velocity on a straight path.
        time_mean: of the logit of t; above 0 for more noise.
        time_std: of the logit of t.
    """

    def __init__(self, process: GaussianProcess, time_mean: float = 0.0, time_std: float = 1.0) -> None:
        check_process(self, process, GaussianProcess)
        if process.prediction != "velocity":
            raise ValueError(
                f"FlowMatchingObjective needs a process whose prediction is velocity, not {process.prediction}"
            )
        if time_std <= 0:
            raise ValueError(f"time_std must be above 0, not {time_std}")
        super().__init__(process)
        self.amounts_at, self.time_mean, self.time_std = process.amounts_at, time_mean, time_std

    def corrupt(self, x: Tensor, seeds: Tensor, step: int) -> Corrupted:
        """Mix clean data x (B, …) with normal noise at a logit-normal time; the target is the velocity."""
        time = torch.sigmoid(self.time_mean + self.time_std * normal(seeds, step, Stream.TIME))
        noise = normal(seeds, step, Stream.NOISE, tuple(x.shape[1:]))
        clean = x.float()
        alpha, sigma = self.amounts_at(time)
        return Corrupted(
            add_noise(clean, noise, alpha, sigma),
            predicted("velocity", clean, noise, alpha, sigma),
            weight=torch.ones_like(time),
            time=time,
        )

    def ground_truth(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """Return ‖û − u‖², mean over elements: prediction (B, …) to (B,)."""
        return weighted_square_error(prediction, corrupted.target, corrupted.weight)

    def distillation(self, student: Tensor, teacher: Tensor, corrupted: Corrupted) -> Tensor:
        """Return ‖û_student − û_teacher‖², mean over elements: (B, …) twice to (B,)."""
        return weighted_square_error(student, teacher.detach(), corrupted.weight)

"""Flow matching: a straight path from data to noise, and the velocity along it, as in Looped-DiT (arXiv 2609.40305)."""

import torch
from torch import Tensor

from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import StraightPath, mix, weighted_square_error
from elt_lightning.processes.noise import Stream, normal


class FlowMatchingObjective(Objective):
    """Squared error of the velocity u = ε − x on z = (1 − s)·x + s·ε, at logit-normal times t; s is t but for a margin.

    t = sigmoid(mean + std·n), n standard normal. Source: Lipman et al. 2023; Esser et al. 2024 (arXiv 2403.03206),
    where, as here, time 1 is noise.

    Args:
        time_mean: of the logit of t; above 0 for more noise.
        time_std: of the logit of t.
        schedule: the path. The sampler must have the same.
    """

    def __init__(self, time_mean: float = 0.0, time_std: float = 1.0, schedule: StraightPath | None = None) -> None:
        if time_std <= 0:
            raise ValueError(f"time_std must be above 0, not {time_std}")
        self.time_mean, self.time_std, self.schedule = time_mean, time_std, schedule or StraightPath()

    def corrupt(self, x: Tensor, seeds: Tensor, step: int) -> Corrupted:
        """Mix clean data x (B, …) with normal noise at a logit-normal time; the target is the velocity."""
        time = torch.sigmoid(self.time_mean + self.time_std * normal(seeds, step, Stream.TIME))
        noise = normal(seeds, step, Stream.NOISE, tuple(x.shape[1:]))
        clean = x.float()
        a, s = self.schedule.amounts(self.schedule.logsnr(time))
        return Corrupted(mix(clean, noise, a, s), target=noise - clean, weight=torch.ones_like(time), time=time)

    def ground_truth(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """‖û − u‖², mean over elements: prediction (B, …) to (B,)."""
        return weighted_square_error(prediction, corrupted.target, corrupted.weight)

    def distillation(self, student: Tensor, teacher: Tensor, corrupted: Corrupted) -> Tensor:
        """‖û_student − û_teacher‖², mean over elements: (B, …) twice to (B,)."""
        return weighted_square_error(student, teacher.detach(), corrupted.weight)

    def denoised(self, prediction: Tensor, noisy: Tensor, condition: Condition) -> Tensor:
        """x̂ = z − s·û, as a + s = 1: (B, …) to (B, …)."""
        assert condition.time is not None
        _, s = self.schedule.amounts(self.schedule.logsnr(condition.time))
        return noisy - s.reshape(-1, *[1] * (noisy.ndim - 1)) * prediction.float()

"""DDPM in a thousand steps as DiT is trained: the noise, and beside it the variance of an ancestral step."""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.processes.base import check_process
from elt_lightning.processes.gaussian import GaussianProcess, LinearBetas, add_noise, weighted_square_error
from elt_lightning.processes.noise import Stream, normal, uniform


class DDPMObjective(Objective):
    """Squared error of ε̂ at uniform steps; where the network predicts a variance, plus the bound that teaches it.

    Letters: C channels of latents, T = 1,000 steps, t a step. A network with C channels more than the latents predicts
    v with them, for the log-variance γ·log β_t + (1 − γ)·log β̃_t of a step from t to t − 1, γ = (v + 1)/2. The bound is
    the divergence of the true step from the predicted one in bits, at t = 0 the data's negative log-likelihood in bytes
    of [−1, 1]; it moves v alone. Source: Nichol and Dhariwal 2021 (arXiv 2102.09672); facebookresearch/DiT, whose
    ``loss`` is this one.

    Args:
        process: ε on :class:`LinearBetas`.
    """

    def __init__(self, process: GaussianProcess) -> None:
        check_process(self, process, GaussianProcess)
        if process.prediction != "epsilon" or not isinstance(process.schedule, LinearBetas):
            raise ValueError(
                "DDPMObjective needs a process whose prediction is epsilon and whose schedule is LinearBetas, not "
                f"{process.prediction} and {process.schedule}"
            )
        super().__init__(process)
        self.schedule: LinearBetas = process.schedule

    def corrupt(self, x: Tensor, seeds: Tensor, step: int) -> Corrupted:
        """Mix clean data x (B, C, …) with noise, the target, at a uniform step; ``time`` is t/1000."""
        time = torch.floor(uniform(seeds, step, Stream.TIME) * self.schedule.STEPS) / self.schedule.STEPS
        noise = normal(seeds, step, Stream.NOISE, tuple(x.shape[1:]))
        alpha, sigma = self.schedule.amounts(self.schedule.logsnr(time))
        return Corrupted(add_noise(x.float(), noise, alpha, sigma), noise, torch.ones_like(time), time)

    def ground_truth(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """Return ‖ε̂ − ε‖², mean over elements, plus the bound: prediction (B, C or 2·C, …) to (B,)."""
        noise, v = self._split(prediction, corrupted)
        loss = weighted_square_error(noise, corrupted.target, corrupted.weight)
        return loss if v is None else loss + self.bound(noise.detach().float(), v.float(), corrupted)

    def distillation(self, student: Tensor, teacher: Tensor, corrupted: Corrupted) -> Tensor:
        """Return ‖ε̂_student − ε̂_teacher‖², plus the same of v, each a mean over elements: to (B,)."""
        pairs = zip(self._split(student, corrupted), self._split(teacher.detach(), corrupted), strict=True)
        errors = [weighted_square_error(s, t, corrupted.weight) for s, t in pairs if s is not None and t is not None]
        return torch.stack(errors).sum(0)

    def bound(self, noise: Tensor, v: Tensor, corrupted: Corrupted) -> Tensor:
        """Return the variational bound at ``corrupted.time`` in bits per value, mean over elements: (B,).

        Args:
            noise: (B, C, …) ε̂.
            v: (B, C, …).
            corrupted: z, ε and t/1000.
        """
        assert corrupted.time is not None
        t = (corrupted.time * self.schedule.STEPS).round().long().view(-1, *[1] * (noise.ndim - 1))
        of_steps = self._of_steps.to(t.device, torch.float32, non_blocking=True)
        smallest, largest, part_of_clean, alpha, sigma = (values[t] for values in of_steps)
        log_variance = torch.lerp(smallest, largest, (v + 1) / 2)
        clean_error = sigma / alpha * (corrupted.target - noise)  # x̂ − x
        mean_error, difference = part_of_clean * clean_error, smallest - log_variance
        divergence = 0.5 * (difference.exp() - difference - 1 + mean_error.square() * (-log_variance).exp())
        clean = (corrupted.inputs - sigma * corrupted.target) / alpha
        likelihood = _log_likelihood(clean, clean + clean_error, 0.5 * log_variance)
        return torch.where(t == 0, -likelihood, divergence).flatten(1).mean(1) / math.log(2)

    @cached_property
    def _of_steps(self) -> Tensor:
        """Tabulate (5, T) in float64: log β̃_t, log β_t, (1 − r)·α_(t−1), which a step's mean has of x̂, α_t and σ_t."""
        now = self.schedule.logsnr(torch.arange(self.schedule.STEPS, dtype=torch.float64) / self.schedule.STEPS)
        earlier = F.pad(now[:-1], (1, 0), value=math.inf)
        rest = torch.log(-torch.expm1(now - earlier))  # log(1 − r)
        smallest, largest = rest + F.logsigmoid(-earlier), rest + F.logsigmoid(-now)
        smallest[0] = smallest[1]  # β̃_0 is 0
        return torch.stack([smallest, largest, rest.exp() * earlier.sigmoid().sqrt(), *self.schedule.amounts(now)])

    @staticmethod
    def _split(prediction: Tensor, corrupted: Corrupted) -> tuple[Tensor, Tensor | None]:
        channels = corrupted.target.shape[1]
        further = prediction[:, channels:]
        return prediction[:, :channels], further if further.shape[1] else None


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return log of a Gaussian's probability of the byte that x lies in, of 255 steps over [−1, 1], its ends open."""

    def below(edge: Tensor) -> Tensor:  # the approximation of the distribution function that the field uses
        centred = (edge - mean) * (-log_std).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (centred + 0.044715 * centred**3)))

    upper, lower = below(x + 1 / 255), below(x - 1 / 255)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()

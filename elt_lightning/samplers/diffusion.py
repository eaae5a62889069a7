"""Diffusion samplers: from noise at time 1 to data at time 0, one network call per step.

Letters: z the state, α and σ the amounts of data and noise in it, x̂ the predicted clean data, B batch, K steps;
subscript t for now and u < t for the end of the step. Every sampler here is linear in z, x̂, the x̂ of the step before,
and fresh noise; a class says with which weights. None needs α² + σ² = 1, so that all follow flow matching's path too.
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from elt_lightning.processes.base import check_process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.noise import Stream, normal
from elt_lightning.samplers.base import Loops, Predict, Sampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.guided_steps import GuidedSteps
from elt_lightning.samplers.loop_schedule import LoopSchedule


class Level(NamedTuple):
    """One time of the trajectory: the time itself, the amounts of data and noise, and logsnr/2 = log(α/σ)."""

    time: float
    alpha: float
    sigma: float
    half_logsnr: float


class StepWeights(NamedTuple):
    """What the next state is made of."""

    state: float
    clean: float
    previous_clean: float = 0.0
    noise: float = 0.0


class DiffusionSampler(Sampler):
    """K steps evenly spaced in time; the last one gives x̂ itself.

    Args:
        process: the schedule, the same as in training.
        num_classes: the null class of guidance.
        steps: K, network calls of one sample (twice that where guidance acts).
        clip: x̂ is cut to ±clip after guidance, for data that lie in that range; None for no cut.
        guidance: classifier-free guidance, on x̂.
        carry_state: as in :class:`~elt_lightning.samplers.base.Sampler`.
        loop_schedule: as there.
    """

    def __init__(
        self,
        process: GaussianProcess,
        num_classes: int,
        steps: int = 64,
        clip: float | None = None,
        guidance: Guidance | None = None,
        carry_state: bool | None = None,
        loop_schedule: LoopSchedule | None = None,
    ) -> None:
        check_process(self, process, GaussianProcess)
        super().__init__(process, num_classes, steps, guidance, carry_state, loop_schedule)
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be above 0, not {clip}")
        self.schedule, self.clip = process.schedule, clip

    def change(self, now: Tensor, before: Tensor, x: Tensor) -> Tensor:
        """Measure the relative change of x̂, ‖now − before‖ / ‖now‖, over all elements of each sample."""
        difference, size = (value.float().flatten(1).norm(dim=1) for value in (now - before, now))
        return difference / size.clamp(min=torch.finfo(torch.float32).tiny)

    @abstractmethod
    def step_weights(self, before: Level | None, now: Level, after: Level) -> StepWeights:
        """Return how a step from ``now`` to ``after`` is made.

        Args:
            before: where the step before this one began, None in the first.
            now: t.
            after: u.
        """

    def levels(self) -> list[Level]:
        """List times 1, 1 − 1/K, …, 0 with their amounts, in float64."""
        time = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        logsnr = self.schedule.logsnr(time)
        columns = torch.stack([time, *self.schedule.amounts(logsnr), logsnr / 2], dim=1)
        return [Level(*row) for row in columns.tolist()]

    def sample(
        self,
        predict: Predict,
        shape: tuple[int, ...],
        condition: Condition,
        loops: Loops,
        seeds: Tensor,
        known: Tensor | None = None,
        spent: list[Tensor] | None = None,
    ) -> Tensor:
        """Draw latents (B, *shape) float32.

        ``known`` holds NaN where nothing is given. Where something is, x̂ is replaced by it in every step, so that
        the state there is the given value with the noise of the step, and the sample has it exactly. See
        :meth:`Sampler.sample`.

        Raises:
            ValueError: ``known`` has another shape than the samples.
        """
        if known is not None and known.shape != (len(seeds), *shape):
            raise ValueError(f"known has shape {tuple(known.shape)}, the samples {(len(seeds), *shape)}")
        state = normal(seeds, 0, Stream.INITIAL_NOISE, shape)
        levels = self.levels()
        clean, guided = state, GuidedSteps(self, predict, loops, spent)
        for step in range(self.steps):
            previous_clean = clean
            time = torch.full((len(seeds),), levels[step].time, device=seeds.device)
            timed = Condition(condition.labels, time)
            clean = guided(step, state, timed).float()
            if self.clip is not None:
                clean = clean.clamp(-self.clip, self.clip)
            if known is not None:
                clean = torch.where(known.isnan(), clean, known.float())
            if step + 1 == self.steps:
                break
            weights = self.step_weights(levels[step - 1] if step else None, levels[step], levels[step + 1])
            state = weights.state * state + weights.clean * clean
            if weights.previous_clean:
                state = state + weights.previous_clean * previous_clean
            if weights.noise:
                state = state + weights.noise * normal(seeds, step, Stream.SAMPLER_NOISE, shape)
        return clean


class DDPMSampler(DiffusionSampler):
    """Ancestral sampling from p(z_u | z_t, x̂).

    With r = e^(logsnr_t − logsnr_u): mean r·(α_u/α_t)·z + (1 − r)·α_u·x̂; log-variance γ·log((1 − r)·σ_t²) +
    (1 − γ)·log((1 − r)·σ_u²). Source: SiD2 (arXiv 2410.19324); (1 − r)·σ_u² is the exact variance where x̂ is known for
    certain, (1 − r)·σ_t² the one for data of unit variance.

    Args:
        process: as in :class:`DiffusionSampler`.
        num_classes: the null class of guidance.
        steps: K; the paper uses 512.
        variance_interpolation: γ in [0, 1]; 0.3 is our default (inferred).
        clip: as in :class:`DiffusionSampler`.
        guidance: classifier-free guidance; the paper uses scale 3.
        carry_state: as in :class:`~elt_lightning.samplers.base.Sampler`.
        loop_schedule: as there.
    """

    def __init__(
        self,
        process: GaussianProcess,
        num_classes: int,
        steps: int = 512,
        variance_interpolation: float = 0.3,
        clip: float | None = None,
        guidance: Guidance | None = None,
        carry_state: bool | None = None,
        loop_schedule: LoopSchedule | None = None,
    ) -> None:
        super().__init__(process, num_classes, steps, clip, guidance, carry_state, loop_schedule)
        if not 0 <= variance_interpolation <= 1:
            raise ValueError(f"variance_interpolation must lie in [0, 1], not {variance_interpolation}")
        self.variance_interpolation = variance_interpolation

    def step_weights(self, before: Level | None, now: Level, after: Level) -> StepWeights:
        """Evaluate the equation above."""
        log_ratio = 2 * (now.half_logsnr - after.half_logsnr)
        ratio, rest = math.exp(log_ratio), -math.expm1(log_ratio)
        std = (
            math.sqrt(rest) * now.sigma**self.variance_interpolation * after.sigma ** (1 - self.variance_interpolation)
        )
        return StepWeights(state=ratio * after.alpha / now.alpha, clean=rest * after.alpha, noise=std)


class DDIMSampler(DiffusionSampler):
    """The deterministic first-order sampler: z_u = α_u·x̂ + σ_u·ε̂ with ε̂ = (z − α_t·x̂)/σ_t (Song, Meng and Ermon 2021).

    On the path of flow matching it is Euler's method.
    """

    def step_weights(self, before: Level | None, now: Level, after: Level) -> StepWeights:
        """Evaluate the equation above."""
        ratio = after.sigma / now.sigma
        return StepWeights(state=ratio, clean=after.alpha - ratio * now.alpha)


class DPMSolverSampler(DiffusionSampler):
    """DPM-Solver++ (2M): second order from one network call per step, by looking back at the step before.

    With λ = log(α/σ), h = λ_u − λ_t and q = h_before/h: z_u = (σ_u/σ_t)·z + α_u·(1 − e^(−h))·(x̂ + (x̂ − x̂_before)/(2q)).
    The first step has nothing to look back at and is DDIM's. Source: Lu et al. 2022 (arXiv 2211.01095, Algorithm 2). On
    evenly spaced times, where λ changes fast at both ends, the error falls as log K/K² until K resolves the ends.
    """

    def __init__(
        self,
        process: GaussianProcess,
        num_classes: int,
        steps: int = 32,
        clip: float | None = None,
        guidance: Guidance | None = None,
        carry_state: bool | None = None,
        loop_schedule: LoopSchedule | None = None,
    ) -> None:
        super().__init__(process, num_classes, steps, clip, guidance, carry_state, loop_schedule)

    def step_weights(self, before: Level | None, now: Level, after: Level) -> StepWeights:
        """Evaluate the equation above."""
        length = after.half_logsnr - now.half_logsnr
        clean = -math.expm1(-length) * after.alpha
        extrapolation = 0.0 if before is None else length / (2 * (now.half_logsnr - before.half_logsnr))
        return StepWeights(after.sigma / now.sigma, clean * (1 + extrapolation), -clean * extrapolation)

"""Gaussian corruption z = α·x + σ·ε in continuous time: schedules, weights, and what a network may predict.

Letters: x clean data, ε standard normal noise, z their mixture, α and σ their amounts, logsnr = log(α²/σ²), B batch.
Time 0 is clean, time 1 is noise. Everything is computed in float32, or float64 where that is what comes in, whatever
precision a network runs in: at the ends of time α or σ is only 5·10⁻⁴.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition

Prediction = Literal["x", "v", "epsilon", "velocity"]
"""What a network predicts: the clean data x, the noise ε, v = α·ε − σ·x (Salimans and Ho 2022), or flow matching's
velocity ε − x."""


class NoiseSchedule(ABC):
    """How much of z is noise at a time in [0, 1]."""

    @abstractmethod
    def logsnr(self, time: Tensor) -> Tensor:
        """Return log(α²/σ²) at times of any shape; finite at 0 and at 1, and falling."""

    def amounts(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α, σ) at a log signal-to-noise ratio of any shape; here √sigmoid(logsnr) and √sigmoid(−logsnr)."""
        logsnr = _precise(logsnr)
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def times(self, steps: int) -> Tensor:
        """Return the times (K,) float64 at which a sampler of K steps calls the network: 1, 1 − 1/K, …, 1/K."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]


@dataclass(frozen=True)
class ShiftedCosine(NoiseSchedule):
    """The cosine schedule, shifted for resolution; variance preserving, α² + σ² = 1.

    logsnr(t) = −2·log tan(t_min + t·(t_max − t_min)) + 2·log shift, with t_min = atan(e^(−highest/2)) and
    t_max = atan(e^(−lowest/2)). Source: "simple diffusion" (arXiv 2301.11093) and SiD2 (arXiv 2410.19324).
    """

    # reference resolution / data resolution. Below 1 there is more noise at every time. ELT's value is not published; 1
    # is our default for latents (inferred)
    shift: float = 1.0
    lowest: float = -15.0  # logsnr at time 1, before the shift
    highest: float = 15.0  # logsnr at time 0, before the shift

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.lowest >= self.highest:
            raise ValueError(f"need shift > 0 and lowest < highest: {self}")

    def logsnr(self, time: Tensor) -> Tensor:
        """Evaluate the equation above."""
        angle, complement, _ = self._angles(time)
        # tan(angle) = sin(angle) / sin(π/2 − angle): both sines keep their digits at their own end of time.
        return 2 * (torch.log(torch.sin(complement)) - torch.log(torch.sin(angle))) + 2 * math.log(self.shift)

    def logsnr_slope(self, time: Tensor) -> Tensor:
        """Return d logsnr/dt = −2·(t_max − t_min) / (sin·cos) of the angle: negative, any shape."""
        angle, complement, span = self._angles(time)
        return -2 * span / (torch.sin(angle) * torch.sin(complement))

    def _angles(self, time: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the angle that belongs to a time, π/2 less that angle, and the angle between times 0 and 1."""
        time = _precise(time)
        first = math.atan(math.exp(-self.highest / 2))
        rest = math.atan(math.exp(self.lowest / 2))
        span = math.pi / 2 - first - rest
        return first + time * span, rest + (1 - time) * span, span


@dataclass(frozen=True)
class StraightPath(NoiseSchedule):
    """The straight path of flow matching: σ = s₀ + t·(1 − 2·s₀) and α = 1 − σ.

    The margin s₀ = sigmoid(−limit/2) keeps α and σ from vanishing at the ends; without it σ would be t.
    """

    limit: float = 15.0  # logsnr at time 0; minus it at time 1. 15 makes s₀ 5·10⁻⁴

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ValueError(f"need limit > 0: {self}")

    def logsnr(self, time: Tensor) -> Tensor:
        """Return 2·log(α/σ)."""
        time = _precise(time)
        margin = 1 / (1 + math.exp(self.limit / 2))
        span = 1 - 2 * margin
        return 2 * (torch.log(margin + (1 - time) * span) - torch.log(margin + time * span))

    def amounts(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return α = sigmoid(logsnr/2) and σ = 1 − α."""
        logsnr = _precise(logsnr)
        return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)


@dataclass(frozen=True)
class LinearBetas(NoiseSchedule):
    """The 1,000 steps of DDPM and DiT: α² = ∏(1 − β) over the steps so far, β rising linearly; α² + σ² = 1.

    Step t is time t/1000. Between steps logsnr is interpolated, and carried on to time 1, one step beyond the last.
    Source: Ho, Jain and Abbeel 2020; facebookresearch/DiT.

    Attributes:
        first: β of step 0.
        last: β of step 999.
    """

    STEPS: ClassVar[int] = 1000

    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last < 1:
            raise ValueError(f"need 0 < first <= last < 1: {self}")

    def logsnr(self, time: Tensor) -> Tensor:
        """Return log(α²/(1 − α²)), a table's value where the time is a step's."""
        time = _precise(time)
        of_steps = self._of_steps.to(time.device, time.dtype, non_blocking=True)
        place = time * self.STEPS
        below = place.detach().floor().clamp(0, self.STEPS - 2).long()
        return torch.lerp(of_steps[below], of_steps[below + 1], place - below)

    @cached_property
    def _of_steps(self) -> Tensor:
        betas = torch.linspace(self.first, self.last, self.STEPS, dtype=torch.float64, device="cpu")
        log_alpha_squared = torch.log1p(-betas).cumsum(0)
        return log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared))

    def times(self, steps: int) -> Tensor:
        """Return the times of K steps spread over the thousand, first and last among them, as DiT's respacing does.

        Raises:
            UserError: there are not so many.
        """
        if steps > self.STEPS:
            raise UserError(f"the noise schedule LinearBetas has {self.STEPS} steps: a sampler cannot take {steps}")
        if steps == 1:
            return torch.tensor([self.STEPS - 1], dtype=torch.float64) / self.STEPS
        stride = (self.STEPS - 1) / (steps - 1)
        places = [round(place) for place in accumulate(repeat(stride, steps - 1), initial=0.0)]
        return torch.tensor(places[::-1], dtype=torch.float64) / self.STEPS


class GaussianProcess(Process):
    """Mix data with noise along a schedule; a network predicts one quantity that separates them.

    Args:
        prediction: what the network predicts; "velocity" where the schedule is a :class:`StraightPath`.
        schedule: logsnr over time.

    Raises:
        ValueError: an unknown prediction, or one that the schedule has no use for.
    """

    def __init__(self, prediction: Prediction = "v", schedule: NoiseSchedule | None = None) -> None:
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction is one of {', '.join(get_args(Prediction))}, not {prediction}")
        default = StraightPath() if prediction == "velocity" else ShiftedCosine()
        self.prediction, self.schedule = prediction, schedule or default
        if (prediction == "velocity") != isinstance(self.schedule, StraightPath):
            raise ValueError(
                f"prediction velocity and a StraightPath go together, not {prediction} and {self.schedule}"
            )

    def amounts_at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α, σ) at times in [0, 1] of any shape."""
        return self.schedule.amounts(self.schedule.logsnr(time))

    def denoised(self, prediction: Tensor, noisy: Tensor, condition: Condition) -> Tensor:
        """Turn what the network predicted for z (B, C, …) at ``condition.time`` into x̂.

        What it predicted in further channels, such as a variance, is passed on in channels behind those of x̂.
        """
        assert condition.time is not None
        alpha, sigma = self.amounts_at(condition.time)
        channels = noisy.shape[1]
        prediction, further = prediction[:, :channels], prediction[:, channels:]
        if self.prediction == "velocity":  # z = (1 − σ)·x + σ·ε, so that x̂ = z − σ·û
            clean = noisy - _per_sample(sigma, noisy) * prediction.float()
        else:
            clean = clean_and_noise(self.prediction, prediction, noisy, alpha, sigma)[0]
        return torch.cat([clean, further.float()], dim=1) if further.shape[1] else clean


def sigmoid_weight(prediction: Prediction, logsnr: Tensor, slope: Tensor, bias: float) -> Tensor:
    """Return the weight of a prediction's squared error under the sigmoid weighting of SiD2.

    On x: −d logsnr/dt · e^b · sigmoid(logsnr − b). A squared error of v or ε is σ⁻² or (α/σ)² times the one of x that
    it makes, so the same loss has the weight σ² or (σ/α)² times that one.

    Args:
        prediction: whose error.
        logsnr: any shape.
        slope: d logsnr/dt, the same shape.
        bias: b. A larger one gives more weight to times with little noise.
    """
    logsnr, slope = _precise(logsnr), _precise(slope)
    if prediction == "epsilon":
        return -slope * torch.sigmoid(bias - logsnr)  # e^b·sigmoid(logsnr − b)·e^(−logsnr), without the large factors
    weight = -slope * math.exp(bias) * torch.sigmoid(logsnr - bias)
    return weight * torch.sigmoid(-logsnr) if prediction == "v" else weight


def add_noise(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return z = α·x + σ·ε for x and ε (B, …), α and σ (B,)."""
    return _per_sample(alpha, clean) * clean + _per_sample(sigma, clean) * noise


def predicted(prediction: Prediction, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what a network should predict where x and ε, each (B, …), are known: x, ε, v = α·ε − σ·x, or ε − x."""
    if prediction == "velocity":
        return noise - clean
    if prediction == "v":
        return _per_sample(alpha, clean) * noise - _per_sample(sigma, clean) * clean
    return clean if prediction == "x" else noise


def clean_and_noise(
    prediction: Prediction, value: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn a prediction into both x̂ and ε̂, so that z = α·x̂ + σ·ε̂; for α² + σ² = 1.

    From v: x̂ = α·z − σ·v and ε̂ = σ·z + α·v. Any other pair of quantities is turned into one another through
    :func:`predicted`.

    Args:
        prediction: what ``value`` is.
        value: (B, …) the prediction, of any precision.
        noisy: (B, …) z.
        alpha: (B,).
        sigma: (B,).
    """
    value, noisy = _precise(value), _precise(noisy)
    alpha, sigma = _per_sample(alpha, noisy), _per_sample(sigma, noisy)
    if prediction == "v":
        return alpha * noisy - sigma * value, sigma * noisy + alpha * value
    if prediction == "x":
        return value, (noisy - alpha * value) / sigma
    return (noisy - sigma * value) / alpha, value


def weighted_square_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return w·‖prediction − target‖² as a mean over each sample's elements: (B, …) twice and (B,) to (B,).

    Raises:
        UserError: the shapes differ, as where a network predicts a variance that the objective has no use for.
    """
    if prediction.shape != target.shape:
        raise UserError(
            f"the objective wants predictions of shape {tuple(target.shape[1:])}, not {tuple(prediction.shape[1:])}: "
            "leave the network's out_channels out, which are for DDPMObjective"
        )
    error = F.mse_loss(_precise(prediction), _precise(target), reduction="none")
    return weight * error.flatten(1).mean(1)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))

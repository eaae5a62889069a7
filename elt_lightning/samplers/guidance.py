"""Classifier-free guidance (Ho and Salimans 2022): uncond + s_k·(cond − uncond)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How strongly each of K sampling steps is pushed towards the class.

    Attributes:
        scale: s; 1 is no guidance and 0 the null class alone, which cost one branch.
        schedule: "constant" s_k = s; "linear" s_k = 1 + (s − 1)·(k + 1)/K; "power_cosine"
            s_k = 1 + (s − 1)·½·(1 − cos(π·((k + 1)/K)^p)). Source: google-research/maskgit and its PyTorch successors.
        power: p of the power-cosine schedule.
        interval: the share of the steps in which guidance acts, from and to: step k of K is guided where
            from ≤ k/K < to. The others cost one branch (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        channels: guided are the first so many channels of latents, the others stay those of the class; None for all.
            DiT's and SiT's published code guides three of four.
    """

    scale: float = 1.0
    schedule: Literal["constant", "linear", "power_cosine"] = "constant"
    power: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.scale < math.inf and 0 < self.power < math.inf):
            raise ValueError(f"guidance needs scale >= 0 and power > 0, not scale {self.scale}, power {self.power}")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance needs an interval (from, to) with 0 <= from < to <= 1, not {self.interval}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance needs channels >= 1, not {self.channels}")

    def scale_at(self, step: int, num_steps: int) -> float:
        """Return s_k at step k (0-based) of K."""
        progress = (step + 1) / num_steps
        if self.schedule == "linear":
            return 1 + (self.scale - 1) * progress
        if self.schedule == "power_cosine":
            return 1 + (self.scale - 1) * 0.5 * (1 - math.cos(math.pi * progress**self.power))
        return self.scale

    def acts(self, step: int, num_steps: int) -> bool:
        """Return whether step k of K is guided at all."""
        first, end = self.interval
        return self.scale != 1.0 and first <= step / num_steps < end

    def branches(self, step: int, num_steps: int) -> int:
        """Return how many times the network sees each sample at step k of K; at s_k = 0 with the null class alone."""
        needs_class = self.scale_at(step, num_steps) != 0 or self.channels is not None
        return 2 if self.acts(step, num_steps) and needs_class else 1

    def combine(
        self, conditional: Tensor, null: Tensor, step: int, num_steps: int, channels: int | None = None
    ) -> Tensor:
        """Return the guided prediction (B, …) of step k of K, given both branches'.

        Args:
            conditional: of the class.
            null: of the null class.
            step: k, 0-based.
            num_steps: K.
            channels: of x̂, where a variance follows, which is never guided.
        """
        count = min((n for n in (self.channels, channels) if n is not None), default=None)
        of_class, of_null = conditional[:, :count], null[:, :count]
        guided = of_null + self.scale_at(step, num_steps) * (of_class - of_null)
        return guided if count is None else torch.cat([guided, conditional[:, count:]], dim=1)

"""Guidance by the class (Ho and Salimans 2022), uncond + s_k·(cond − uncond), and by an exit, p_L + w_k·(p_L − p_r)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "linear", "power_cosine"]


@dataclass(frozen=True)
class Guidance:
    """How strongly each of K sampling steps is pushed towards the class, and away from an early exit.

    Exit guidance is autoguidance (Karras et al. 2024, arXiv 2406.02507) whose bad version is exit r < L of the same
    pass: it costs one more head. Its neighbours are Internal Guidance (2512.24176) and LoopCD (2609.24196).

    Attributes:
        scale: s; 1 is no guidance and 0 the null class alone, which cost one branch.
        schedule: "constant" s_k = s; "linear" s_k = 1 + (s − 1)·(k + 1)/K; "power_cosine"
            s_k = 1 + (s − 1)·½·(1 − cos(π·((k + 1)/K)^p)). Source: google-research/maskgit and its PyTorch successors.
        power: p of the power-cosine schedule.
        interval: the share of the steps in which guidance acts, from and to: step k of K is guided where
            from ≤ k/K < to. The others cost one branch (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        channels: guided are the first so many channels of latents, the others stay those of the class; None for all.
            DiT's and SiT's published code guides three of four.
        exit_scale: w; 0 is no exit guidance.
        weak_loops: r, the exit that predictions are pushed away from; below the loops of every step that it acts in.
        exit_schedule: of w_k, which grows from 0 to w as s_k does from 1 to s.
        exit_interval: as ``interval``.
    """

    scale: float = 1.0
    schedule: Schedule = "constant"
    power: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    exit_scale: float = 0.0
    weak_loops: int = 1
    exit_schedule: Schedule = "constant"
    exit_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not (0 <= self.scale < math.inf and 0 < self.power < math.inf):
            raise ValueError(f"guidance needs scale >= 0 and power > 0, not scale {self.scale}, power {self.power}")
        if not 0 <= self.exit_scale < math.inf or self.weak_loops < 1 or self.weak_loops % 1:
            raise ValueError(
                "exit guidance needs exit_scale >= 0 and a whole number weak_loops >= 1, not "
                f"{self.exit_scale}, {self.weak_loops}"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance needs channels >= 1, not {self.channels}")
        for name, interval in (("interval", self.interval), ("exit_interval", self.exit_interval)):
            if not 0 <= interval[0] < interval[1] <= 1:
                raise ValueError(f"guidance needs an {name} (from, to) with 0 <= from < to <= 1, not {interval}")

    def scale_at(self, step: int, num_steps: int) -> float:
        """Return s_k at step k (0-based) of K."""
        if self.schedule == "constant":
            return self.scale
        return 1 + (self.scale - 1) * self._risen(self.schedule, step, num_steps)

    def exit_scale_at(self, step: int, num_steps: int) -> float:
        """Return w_k at step k (0-based) of K, 0 outside its interval."""
        first, end = self.exit_interval
        acts = first <= step / num_steps < end
        return self.exit_scale * self._risen(self.exit_schedule, step, num_steps) if acts else 0.0

    def _risen(self, schedule: Schedule, step: int, num_steps: int) -> float:
        """Return the share in [0, 1] that a schedule has risen to."""
        progress = (step + 1) / num_steps
        if schedule == "linear":
            return progress
        return 0.5 * (1 - math.cos(math.pi * progress**self.power)) if schedule == "power_cosine" else 1.0

    def acts(self, step: int, num_steps: int) -> bool:
        """Return whether step k of K is guided by the class at all."""
        first, end = self.interval
        return self.scale != 1.0 and first <= step / num_steps < end

    def branches(self, step: int, num_steps: int) -> int:
        """Return how many times the network sees each sample at step k of K; at s_k = 0 with the null class alone."""
        needs_class = self.scale_at(step, num_steps) != 0 or self.channels is not None
        return 2 if self.acts(step, num_steps) and needs_class else 1

    def exits(self, step: int, num_steps: int) -> tuple[int, ...]:
        """Return which exits step k of K needs beside the last: r, or none."""
        return (self.weak_loops,) if self.exit_scale_at(step, num_steps) else ()

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
        return _with_rest(of_null + self.scale_at(step, num_steps) * (of_class - of_null), conditional)

    def away_from_exit(
        self, predictions: Mapping[int, Tensor], loops: int, step: int, num_steps: int, channels: int | None = None
    ) -> Tensor:
        """Return p_L + w_k·(p_L − p_r), (B, …), at step k of K, given {exit: prediction}; see :meth:`combine`."""
        weight = self.exit_scale_at(step, num_steps)
        if not weight:
            return predictions[loops]
        strong, weak = predictions[loops][:, :channels], predictions[self.weak_loops][:, :channels]
        return _with_rest(strong + weight * (strong - weak), predictions[loops])


def _with_rest(guided: Tensor, prediction: Tensor) -> Tensor:
    """Return what was guided, the first channels of a prediction, with its other channels as they are."""
    rest = prediction[:, guided.shape[1] :]
    return torch.cat([guided, rest], dim=1) if rest.shape[1] else guided

"""What a sampler offers: samples, and what they cost."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from torch import Tensor

from elt_lightning.processes.conditioning import Condition
from elt_lightning.samplers.guidance import Guidance, Predict

Loops = int | Sequence[int]
"""One loop count for every sampling step, or one for each."""


class Sampler(ABC):
    """Draws samples by calling a prediction function once per step.

    Args:
        num_classes: the null class.
        steps: K, sampling steps.
        guidance: classifier-free guidance.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, num_classes: int, steps: int, guidance: Guidance | None = None) -> None:
        if steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {steps}")
        self.num_classes, self.steps, self.guidance = num_classes, steps, guidance or Guidance()

    @abstractmethod
    def sample(
        self,
        predict: Predict,
        shape: tuple[int, ...],
        condition: Condition,
        loops: Loops,
        seeds: Tensor,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            predict: the network as a function of (x, condition, loops); for diffusion it gives x̂.
            shape: shape of one sample.
            condition: labels (B,).
            loops: a number, or one per sampling step.
            seeds: (B,) int64 per-sample seeds; sample i depends on seeds[i] alone.
            known: (B, *shape) what is given and must stay, marked as the sampler says; None for nothing.

        Returns:
            (B, *shape) tokens or latents.
        """

    def with_guidance_scale(self, scale: float) -> Self:
        """Give the same sampler with another guidance scale."""
        other = copy.copy(self)
        other.guidance = replace(self.guidance, scale=scale)
        return other

    def loops_per_step(self, loops: Loops) -> list[int]:
        """Write out the loop count of each step.

        Raises:
            ValueError: a loop count below 1, or a list whose length is not the number of steps.
        """
        per_step = [loops] * self.steps if isinstance(loops, int) else list(loops)
        if len(per_step) != self.steps or min(per_step) < 1:
            raise ValueError(
                f"loops must be a number from 1 up, or {self.steps} of them, one per sampling step: {loops}"
            )
        return per_step

    def network_calls(self, loops: Loops) -> list[int]:
        """List the loop count of every forward pass that one sample costs, both guidance branches included."""
        per_step = enumerate(self.loops_per_step(loops))
        return [count for step, count in per_step for _ in range(self.guidance.branches(step, self.steps))]

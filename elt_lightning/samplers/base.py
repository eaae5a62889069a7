"""What a sampler offers: samples, and what they cost."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor

from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.samplers.guidance import Guidance


class Predict(Protocol):
    """The network as samplers see it."""

    def __call__(
        self, x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> tuple[Mapping[int, Tensor], Tensor]:
        """Predict from x (B, …), beginning the loop anew or from a state.

        Returns:
            {r: logits (B, T, V) for tokens x (B, T), or x̂ for noisy latents} for every r in ``exits`` and for
            ``loops``; and the loop's state (B, T, D) at its end.
        """


Loops = int | Sequence[int]
"""One loop count for every sampling step, or one for each."""


class Sampler(ABC):
    """Draws samples by calling a prediction function once per step.

    Args:
        process: the model's.
        num_classes: the null class.
        steps: K, sampling steps.
        guidance: classifier-free guidance.
        carry_state: begin the loop of every step but the first from the state that the step before ended with, in both
            branches of guidance; this needs a network with recall. None: where the network has recall.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(
        self,
        process: Process,
        num_classes: int,
        steps: int,
        guidance: Guidance | None = None,
        carry_state: bool | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {steps}")
        self.process = process
        self.num_classes, self.steps, self.guidance = num_classes, steps, guidance or Guidance()
        self.carry_state = carry_state

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
            predict: the network.
            shape: shape of one sample.
            condition: labels (B,).
            loops: a number, or one per sampling step.
            seeds: (B,) int64 per-sample seeds; sample i depends on seeds[i] alone.
            known: (B, *shape) what is given and must stay, the mask token or NaN elsewhere; None for nothing.

        Returns:
            (B, *shape) tokens or latents.
        """

    def with_guidance_scale(self, scale: float) -> Self:
        """Return the same sampler with another guidance scale."""
        other = copy.copy(self)
        other.guidance = replace(self.guidance, scale=scale)
        return other

    def with_carry_state(self, carry_state: bool | None) -> Self:
        """Return the same sampler with the state carried from step to step, or not, or as suits the network."""
        other = copy.copy(self)
        other.carry_state = carry_state
        return other

    def suited_to(self, has_recall: bool) -> Self:
        """Return the same sampler with ``carry_state`` settled for a network that has recall, or has none.

        Raises:
            ValueError: the state is to be carried, and the network has no recall.
        """
        if self.carry_state and not has_recall:
            raise ValueError(
                "carry_state needs a network with recall, and this one has none: set the sampler's carry_state to "
                "false or null, or train a network with recall: true"
            )
        return self.with_carry_state(has_recall if self.carry_state is None else self.carry_state)

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


class GuidedSteps:
    """Guided predictions of the network, step after step, with the loop's state carried along.

    Both branches of guidance go through the network in one batch, each with its own state. Where guidance
    begins to act after the first step, its null branch begins from the state of the other one, which has seen the same
    input: both tend to fixed points that differ by the class alone.

    Args:
        sampler: its steps, guidance and ``carry_state``.
        predict: the network.
        loops: a number, or one per sampling step.
        channels: of x̂, in predictions that may hold a variance too.

    Raises:
        ValueError: loops that do not fit the steps.
    """

    def __init__(self, sampler: Sampler, predict: Predict, loops: Loops, channels: int | None = None) -> None:
        self.sampler, self.predict, self.loops = sampler, predict, sampler.loops_per_step(loops)
        self.channels = channels
        self.state: Tensor | None = None

    def __call__(self, step: int, x: Tensor, condition: Condition) -> Tensor:
        """Return the prediction for x (B, …) at a step (0-based): logits (B, T, V) or x̂."""
        sampler, loops, batch = self.sampler, self.loops[step], len(x)
        branches = sampler.guidance.branches(step, sampler.steps)
        if sampler.guidance.acts(step, sampler.steps):
            null = condition.with_labels(torch.full_like(condition.labels, sampler.num_classes))
            condition = condition.joined(null) if branches == 2 else null
            x = x.repeat(branches, *[1] * (x.ndim - 1))
        state = self.state
        if state is not None and len(state) != len(x):  # guidance begins or ceases to act
            state = state[:batch].repeat(branches, 1, 1)
        predictions, state = self.predict(x, condition, loops, state=state)
        if sampler.carry_state:
            self.state = state
        if branches == 1:
            return predictions[loops]
        of_class, of_null = predictions[loops].chunk(2)
        return sampler.guidance.combine(of_class, of_null, step, sampler.steps, self.channels)

"""What a sampler offers: samples, and what they cost."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Protocol, Self

from torch import Tensor

from elt_lightning.errors import check_most
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.loop_schedule import LoopSchedule


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
"""One loop count L, which the sampler's schedule spreads over its steps, or one for each sampling step."""

OF_GUIDANCE = {"guidance": "scale", "exit_scale": "exit_scale", "weak_loops": "weak_loops"}
OF_LOOPS = {"loop_schedule": "shape", "tolerance": "tolerance"}
SETTINGS = ("steps", "carry_state", *OF_GUIDANCE, *OF_LOOPS)
"""The settings of a sampler that may be swept, by the names that flags, tables and plans have."""


class Sampler(ABC):
    """Draws samples by calling a prediction function once per step.

    Args:
        process: the model's.
        num_classes: the null class.
        steps: K, sampling steps.
        guidance: by the class and by an exit.
        carry_state: begin the loop of every step but the first from the state that the step before ended with, times
            :meth:`carried_shares`, in both branches of guidance; this needs a network with recall. None: where the
            network has recall.
        loop_schedule: how loops are spread over the steps, and when a sample's loop may stop.

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
        loop_schedule: LoopSchedule | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {steps}")
        check_most(steps=steps)
        self.process = process
        self.num_classes, self.steps, self.guidance = num_classes, steps, guidance or Guidance()
        self.carry_state, self.loop_schedule = carry_state, loop_schedule or LoopSchedule()

    @abstractmethod
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
        """Draw samples.

        Args:
            predict: the network.
            shape: shape of one sample.
            condition: labels (B,).
            loops: a number, or one per sampling step.
            seeds: (B,) int64 per-sample seeds; sample i depends on seeds[i] alone.
            known: (B, *shape) what is given and must stay, the mask token or NaN elsewhere; None for nothing.
            spent: takes the loops (B,) that each step ran, float: of two branches of guidance the mean.

        Returns:
            (B, *shape) tokens or latents.
        """

    @abstractmethod
    def change(self, now: Tensor, before: Tensor, x: Tensor) -> Tensor:
        """Measure how much a prediction for x (b, …) differs from the loop before's: (b,), at least 0."""

    def carried_shares(self) -> list[float]:
        """List how much of the carried state each of the K steps begins from, in [0, 1]: all of it."""
        return [1.0] * self.steps

    def settings(self) -> dict[str, Any]:
        """Return what may be swept; ``weak_loops`` is None where there is no exit guidance."""
        settings = {"steps": self.steps, "carry_state": bool(self.carry_state)}
        settings |= {name: getattr(self.guidance, field) for name, field in OF_GUIDANCE.items()}
        settings |= {name: getattr(self.loop_schedule, field) for name, field in OF_LOOPS.items()}
        return settings | ({} if self.guidance.exit_scale else {"weak_loops": None})

    def with_settings(self, **changes: Any) -> Self:
        """Return the same sampler with some of its :meth:`settings` changed; ``weak_loops`` None leaves it as it is.

        Raises:
            ValueError: a value that the setting may not have, or a weak exit alone, where there is no exit guidance.
            UserError: more steps than anybody waits for.
        """
        other = copy.copy(self)
        if changes.get("weak_loops", 0) is None:
            del changes["weak_loops"]
        if "weak_loops" in changes and "exit_scale" not in changes and not self.guidance.exit_scale:
            raise ValueError("weak_loops alone changes nothing: the sampler's exit_scale is 0, give one above it too")
        for part, fields in (("guidance", OF_GUIDANCE), ("loop_schedule", OF_LOOPS)):
            changed = {field: changes.pop(name) for name, field in fields.items() if name in changes}
            setattr(other, part, replace(getattr(self, part), **changed))
        other.steps, other.carry_state = changes.pop("steps", self.steps), changes.pop("carry_state", self.carry_state)
        if changes:
            raise ValueError(f"a sampler has no such setting: {', '.join(changes)}; there are {', '.join(SETTINGS)}")
        if not isinstance(other.steps, Integral) or other.steps < 1:
            raise ValueError(f"steps must be a whole number from 1 up, not {other.steps!r}")
        check_most(steps=other.steps)
        if other.carry_state not in (None, False, True):
            raise ValueError(f"carry_state is true, false or null, not {other.carry_state!r}")
        return other

    def suited_to(self, has_recall: bool) -> Self:
        """Return the same sampler with ``carry_state`` settled for a network that has recall, or has none.

        Raises:
            ValueError: the state is to be carried, or a loop to stop by a tolerance, and the network has no recall.
        """
        for name, asked in (("carry_state", self.carry_state), ("tolerance", self.loop_schedule.tolerance is not None)):
            if asked and not has_recall:
                raise ValueError(
                    f"{name} needs a network with recall, and this one has none: set the sampler's {name} to "
                    f"{'false or ' if name == 'carry_state' else ''}null, or train a network with recall: true"
                )
        return self.with_settings(carry_state=has_recall if self.carry_state is None else self.carry_state)

    def loops_per_step(self, loops: Loops) -> list[int]:
        """Write out the loop count of each step; with a tolerance, the most that it may run.

        Raises:
            ValueError: a loop count that is no whole number from 1 up, a list whose length is not the number of steps,
                or exit guidance at a step that has no loop beyond the weak exit.
        """
        per_step = list(loops) if isinstance(loops, Iterable) else self.loop_schedule.per_step(loops, self.steps)
        if len(per_step) != self.steps or not all(isinstance(count, Integral) and count >= 1 for count in per_step):
            raise ValueError(
                f"loops must be a whole number from 1 up, or {self.steps} of them, one per sampling step, not {loops!r}"
            )
        for step, count in enumerate(per_step):
            if any(weak >= count for weak in self.guidance.exits(step, self.steps)):
                raise ValueError(
                    f"exit guidance pushes away from exit {self.guidance.weak_loops}, which must come before the last: "
                    f"sampling step {step + 1} runs {count}; lower weak_loops, raise loops, or set an exit_interval"
                )
        return list(map(int, per_step))

    def network_calls(self, loops: Loops) -> list[tuple[int, tuple[int, ...]]]:
        """List loop count and further exits of every forward pass that one sample costs, guidance branches included.

        With a tolerance these are passes of one loop each, as many as there can be at most.
        """
        calls: list[tuple[int, tuple[int, ...]]] = []
        for step, count in enumerate(self.loops_per_step(loops)):
            exits = self.guidance.exits(step, self.steps)
            once = [(1, ())] * count if self.loop_schedule.tolerance is not None else [(count, exits)]
            calls += self.guidance.branches(step, self.steps) * once
        return calls

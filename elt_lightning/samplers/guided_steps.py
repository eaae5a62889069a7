"""One sampling step after the other: the network's predictions, guided, with the loop's state carried along."""

import torch
from torch import Tensor

from elt_lightning.processes.conditioning import Condition
from elt_lightning.samplers.base import Loops, Predict, Sampler


class GuidedSteps:
    """Guided predictions of the network, step after step, with the loop's state carried along.

    Both branches of guidance go through the network in one batch, each with its own state. Where guidance
    begins to act after the first step, its null branch begins from the state of the other one, which has seen the same
    input: both tend to fixed points that differ by the class alone.

    With a tolerance each row of the batch is looped on its own until its prediction has settled, by passes of one loop
    that go on from the last one's state. A row that has settled leaves the batch; its neighbours do not change it.

    Args:
        sampler: its steps, guidance, loop schedule and ``carry_state``.
        predict: the network.
        loops: a number, or one per sampling step.
        spent: takes the loops (B,) that each step ran, as :meth:`Sampler.sample` says.
        channels: of x̂, in predictions that may hold a variance too.

    Raises:
        ValueError: loops that do not fit the steps, or not the weak exit of guidance.
    """

    def __init__(
        self,
        sampler: Sampler,
        predict: Predict,
        loops: Loops,
        spent: list[Tensor] | None = None,
        channels: int | None = None,
    ) -> None:
        self.sampler, self.predict, self.loops = sampler, predict, sampler.loops_per_step(loops)
        self.channels = channels
        self.spent = spent
        self.shares = sampler.carried_shares() if sampler.carry_state else []
        self.state: Tensor | None = None
        self.last: Tensor | None = None

    def __call__(self, step: int, x: Tensor, condition: Condition) -> Tensor:
        """Return the prediction for x (B, …) at a step (0-based): logits (B, T, V) or x̂."""
        sampler, guidance, loops, batch = self.sampler, self.sampler.guidance, self.loops[step], len(x)
        branches = guidance.branches(step, sampler.steps)
        null_alone = branches == 1 and guidance.acts(step, sampler.steps)
        if guidance.acts(step, sampler.steps):
            null = condition.with_labels(torch.full_like(condition.labels, sampler.num_classes))
            condition = condition.joined(null) if branches == 2 else null
            x = x.repeat(branches, *[1] * (x.ndim - 1))
        exits, state = guidance.exits(step, sampler.steps), _for_rows(self.state, batch, len(x), null_alone)
        if state is not None and self.shares[step] != 1:
            state = state * self.shares[step]
        if sampler.loop_schedule.tolerance is None:
            predictions, state = self.predict(x, condition, loops, exits, state=state)
            taken = torch.full((len(x),), loops, device=x.device)
        else:
            self.last = _for_rows(self.last, batch, len(x), null_alone)
            predictions, state, taken = self._settle(x, condition, loops, exits, state)
            self.last = predictions[loops]
        if self.spent is not None:
            self.spent.append(taken.view(branches, batch).float().mean(0))
        if sampler.carry_state:
            self.state = state
        prediction = guidance.away_from_exit(predictions, loops, step, sampler.steps, self.channels)
        if branches == 1:
            return prediction
        of_class, of_null = prediction.chunk(2)
        return guidance.combine(of_class, of_null, step, sampler.steps, self.channels)

    def _settle(
        self, x: Tensor, condition: Condition, most: int, exits: tuple[int, ...], state: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """Loop each row of x (B, …) until it has settled.

        Args:
            x: input of the network.
            condition: of every row.
            most: loops at most.
            exits: further predictions to keep; every row runs at least one loop beyond them.
            state: (B, T, D) to begin from, or None.

        Returns:
            {exit: prediction (B, …)}, the last one under ``most``; the state (B, T, D); and the loops (B,) of each row.
        """
        tolerance = self.sampler.loop_schedule.tolerance
        assert tolerance is not None
        before, rows = self.last, torch.arange(len(x), device=x.device)
        kept: dict[int, Tensor] = {}
        taken = torch.ones_like(rows)
        for loop in range(1, most + 1):
            begin = None if state is None else state[rows]
            predictions, ended = self.predict(x[rows], condition.rows(rows), 1, (), state=begin)
            now, taken[rows] = predictions[1], loop
            is_settled = torch.zeros_like(rows, dtype=torch.bool)
            if before is not None and loop > max(exits, default=0):
                is_settled = self.sampler.change(now, before[rows], x[rows]) <= tolerance
            if loop == 1:
                before, state = now, ended
            else:
                assert before is not None
                assert state is not None
                before, state = before.index_copy(0, rows, now), state.index_copy(0, rows, ended)
            if loop in exits:
                kept[loop] = before
            rows = rows[~is_settled]
            if not len(rows):
                break
        assert before is not None
        assert state is not None
        return kept | {most: before}, state, taken


def _for_rows(values: Tensor | None, batch: int, rows: int, null_alone: bool) -> Tensor | None:
    """Fit what is carried to the rows of this step: guidance may begin or cease to act, the class comes first."""
    if values is None or len(values) == rows:
        return values
    kept = values[-batch:] if null_alone else values[:batch]
    return kept.repeat(rows // batch, *[1] * (values.ndim - 1))

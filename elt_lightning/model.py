"""The model itself: it wires network, process, objective, distillation and sampler; it does no mathematics.

:class:`~elt_lightning.training.module.ELTModule` is this with what Lightning needs to train it. This file imports none
of that, so that what only draws starts in the time that torch takes to import.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elt_lightning.errors import UserError
from elt_lightning.networks.base import LoopedNetwork, Pass
from elt_lightning.objectives.base import Objective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Loops, Sampler

VAL_STEP = 0
"""Held-out losses are measured with the noise of one fixed step, so that they can be compared over training."""


AUTO_LOOPS = 8
"""How many times L_max a loop that stops by itself may run."""


class ELTModel(nn.Module):
    """An Elastic Looped Transformer: every loop count is a usable model.

    Args:
        network: predicts at every exit of one pass.
        process: how data are corrupted, and what a prediction says about the clean data.
        objective: built from the process; it scores one prediction.
        distillation: which loop counts a step of training trains, and how their losses combine.
        sampler: built from the process and the number of classes; it draws samples.
        num_classes: the null class; linked from the data module.
        seed: decides every random number of training; linked to ``seed_everything``.
    """

    def __init__(
        self,
        network: LoopedNetwork,
        process: Process,
        objective: Callable[[Process], Objective],
        distillation: ILSD,
        sampler: Callable[[Process, int], Sampler],
        num_classes: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed_everything must lie in [0, 2^31), not {seed}")
        self.network, self.process, self.distillation = network, process, distillation
        self.objective = objective(process)
        self.sampler = sampler(process, num_classes).suited_to(network.has_recall)
        self.num_classes, self.seed = num_classes, seed

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def max_loops(self) -> int:
        """L_max, the loop count of the teacher."""
        return self.distillation.max_loops

    def loop_count(self, asked: int | Literal["auto"] | None, sampler: Sampler | None = None) -> int:
        """Return L: what was asked for, by default L_max; "auto" is the most that a loop may run which ends by itself.

        Raises:
            UserError: a loop is to end by itself, and the sampler has no tolerance that says when.
        """
        if asked == "auto":
            if (sampler or self.sampler).loop_schedule.tolerance is None:
                raise UserError("loops auto: a tolerance must say when a sample's loop ends, such as --tolerance 0.01")
            return AUTO_LOOPS * self.max_loops
        return self.max_loops if asked is None else asked

    @property
    def codebook_size(self) -> int | None:
        """V of a model of tokens, None of one of latents."""
        return self.process.codebook_size

    @property
    def grid(self) -> tuple[int, ...]:
        """The cells that tokens or latents lie in: ([frames], height, width)."""
        return self.network.input_shape if self.codebook_size is not None else self.network.input_shape[1:]

    def held_out_losses(self, batch: Any, loops: Sequence[int]) -> dict[int, Tensor]:
        """Compute the ground-truth loss at several loop counts, all from one pass: {loops: mean over the batch}."""
        corrupted = self.objective.corrupt(batch.x, sample_seeds(self.seed, batch.indices), VAL_STEP)
        predictions, _ = self.network(corrupted.inputs, Condition(batch.labels, corrupted.time), max(loops), loops)
        return {count: self.objective.ground_truth(p, corrupted).mean() for count, p in predictions.items()}

    def predict(
        self, x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> Pass:
        """Call the network as samplers see it: its predictions are logits or x̂."""
        predictions, state = self.network(x, condition, loops, exits, state)
        return Pass({r: self.process.denoised(p, x, condition) for r, p in predictions.items()}, state)

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        loops: Loops,
        seeds: Tensor,
        known: Tensor | None = None,
        sampler: Sampler | None = None,
        spent: list[Tensor] | None = None,
    ) -> Tensor:
        """Draw samples with the model's sampler or another one.

        Args:
            labels: (B,) int64 in [0, num_classes].
            loops: a number, or one per sampling step.
            seeds: (B,) int64 from :func:`~elt_lightning.processes.noise.sample_seeds`.
            known: (B, …) what is given and must stay, or None.
            sampler: in place of the model's own.
            spent: takes the loops (B,) of each step, as :meth:`~elt_lightning.samplers.base.Sampler.sample` says.

        Returns:
            (B, …) tokens or latents; the data's tokenizer turns them into pixels.

        Raises:
            ValueError: the sampler carries the state or has a tolerance, and the network has no recall.
            UserError: what the network predicts is not finite; see :meth:`refuse_broken`.
        """
        sampler = (sampler or self.sampler).suited_to(self.network.has_recall)
        broken: list[Tensor] = []

        def without_nan(
            x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
        ) -> Pass:
            predictions, state = self.predict(x, condition, loops, exits, state)
            # A sampler could not go on with NaN, and to look whether there is any would be to wait for the device.
            nan = {r: prediction.isnan() for r, prediction in predictions.items()}
            broken.extend(where.any() for where in nan.values())
            return Pass({r: prediction.masked_fill(nan[r], 0) for r, prediction in predictions.items()}, state)

        shape, condition = self.network.sample_shape, Condition(labels)
        samples = sampler.sample(without_nan, shape, condition, loops, seeds, known, spent)
        if spent is not None and not spent:  # a sampler of one's own that does not say runs what it was asked for
            spent += [torch.full_like(labels, count, dtype=torch.float32) for count in sampler.loops_per_step(loops)]
        if (broken and torch.stack(broken).any()) or not samples.isfinite().all():
            message = f"at {loops} loops the model's predictions are not finite, though its weights are: they overflow"
            self.refuse_broken(message)
        return samples

    def refuse_broken(self, message: str) -> None:
        """Refuse samples that are not finite (UserError)."""
        raise UserError(f"{message}; try fewer loops, a wider --trainer.precision, or another checkpoint")

    def macs_per_sample(self, loops: Loops, sampler: Sampler | None = None) -> int:
        """Count the multiply–accumulates of drawing one sample: every step, both guidance branches, every head.

        With a tolerance it is the most that a sample can cost.
        """
        calls = Counter((sampler or self.sampler).network_calls(loops))
        return sum(times * self.network.macs(*call) for call, times in calls.items())

    def num_parameters(self) -> tuple[int, int]:
        """Count parameters: of the shared backbone, which the paper's tables report for ELT, and in all."""

        def count(module: nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        return count(self.network.backbone), count(self.network)

"""The LightningModule: it wires network, objective, distillation, sampler and optimiser; it does no mathematics."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from elt_lightning.errors import UserError
from elt_lightning.networks.base import LoopedNetwork, Pass
from elt_lightning.networks.looped import CompileMode
from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition, drop_labels
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Loops, Sampler
from elt_lightning.training.optimiser import LearningRateSchedule, parameter_groups, prefer_fused, with_schedule
from elt_lightning.training.sharding import gather_weights, release_weights, shard
from elt_lightning.training.weights import differences

logger = logging.getLogger(__name__)

VAL_STEP = 0
"""Held-out losses are measured with the noise of one fixed step, so that they can be compared over training."""


AUTO_LOOPS = 8
"""How many times L_max a loop that stops by itself may run."""


@dataclass(frozen=True)
class OuterTeacher:
    """A trained model that teaches L_max beside the data: the unlooped one that a looped one was made of."""

    path: str  # a checkpoint or model folder
    weight: float = 1.0  # of the distillation loss against it

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of the outer teacher must be above 0 and finite, not {self.weight}")


class ELTModule(LightningModule):
    """An Elastic Looped Transformer, trained so that every loop count is a usable model.

    Args:
        network: predicts at every exit of one pass.
        process: how data are corrupted, and what a prediction says about the clean data.
        objective: built from the process; it scores one prediction.
        distillation: which loop counts a step trains, and how their losses combine.
        sampler: built from the process and the number of classes; it draws samples.
        num_classes: the null class; linked from the data module.
        optimizer: makes the optimiser from parameter groups. The paper: AdamW, 1e-4, betas (0.9, 0.96), decay 0.045.
            Where torch has a fused kernel for it, that is used, unless ``fused`` or ``foreach`` is given.
        learning_rate_schedule: warm-up and decay.
        class_dropout_prob: share of labels replaced by the null class in training, so that guidance can be used.
        seed: decides every random number of training; linked to ``seed_everything``.
        compile: compile the body of the loop before training or testing: true, or a mode of `torch.compile`. Of these
            "reduce-overhead" replays CUDA graphs, for sampling few at a time on a GPU.
        outer_teacher: a frozen model that L_max learns from too, by the distillation loss on the same corrupted batch.
    """

    def __init__(
        self,
        network: LoopedNetwork,
        process: Process,
        objective: Callable[[Process], Objective],
        distillation: ILSD,
        sampler: Callable[[Process, int], Sampler],
        num_classes: int,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] = torch.optim.AdamW,
        learning_rate_schedule: LearningRateSchedule | None = None,
        class_dropout_prob: float = 0.1,
        seed: int = 0,
        compile: bool | CompileMode = False,  # noqa: A002
        outer_teacher: OuterTeacher | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], not {class_dropout_prob}")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed_everything must lie in [0, 2^31), not {seed}")
        self.network, self.process, self.distillation = network, process, distillation
        self.objective = objective(process)
        self.sampler = sampler(process, num_classes).suited_to(network.has_recall)
        self.num_classes, self.class_dropout_prob, self.seed = num_classes, class_dropout_prob, seed
        self.make_optimizer = optimizer
        self.compile_mode = "default" if compile is True else compile
        self.learning_rate_schedule = learning_rate_schedule or LearningRateSchedule()
        self.outer_teacher = outer_teacher
        self.teacher: ELTModule | None = None
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())

    def setup(self, stage: str) -> None:
        """Compile the loop's body if asked to; models built without a trainer are left alone."""
        if self.compile_mode:
            self.network.backbone.compile_loop(self.compile_mode)

    def configure_model(self) -> None:
        """Shard the weights over the devices of ``ModelParallelStrategy``, the one strategy that has a mesh."""
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another network, and broken ones, before anything is loaded.

        Raises:
            UserError: names, shapes or types of the weights differ, or not all are finite.
        """
        if faults := differences(self.state_dict(), checkpoint["state_dict"]):
            raise UserError(f"the checkpoint is of another network, or its weights are damaged: {faults}")

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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's own generator, which dropout alone uses, from (seed, step, rank, micro-batch)."""
        if self._has_dropout:
            torch.manual_seed(hash((self.seed, self.global_step, self.global_rank, batch_idx)) % 2**63)

    def loss(self, batch: Any, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Compute the loss of Algorithm 1: corrupt, one forward pass with exits, combine the losses.

        Args:
            batch: a :class:`~elt_lightning.data.base.Batch`.
            step: optimiser steps done; with the seed it decides noise, dropped labels and the students' exits.
            progress: share of training done, in [0, 1].

        Returns:
            the scalar loss and its named terms, as :meth:`~elt_lightning.objectives.ilsd.ILSD.loss` does.
        """
        seeds = sample_seeds(self.seed, batch.indices)
        labels = drop_labels(batch.labels, seeds, step, self.class_dropout_prob, self.num_classes)
        corrupted = self.objective.corrupt(batch.x, seeds, step)
        exits = self.distillation.student_exits(self.seed, step)
        predictions, _ = self.network(corrupted.inputs, Condition(labels, corrupted.time), self.max_loops, exits)
        loss, terms = self.distillation.loss(predictions, corrupted, self.objective, progress)
        if self.outer_teacher is not None:
            taught = self._taught(predictions[self.max_loops], corrupted, labels)
            loss = loss + self.outer_teacher.weight * taught
            terms |= {"loss": loss.detach(), "loss_outer_teacher": taught.detach()}
        return loss, terms

    def learn_from(self, teacher: "ELTModule") -> None:
        """Take the frozen model that ``outer_teacher`` names; it is no part of this module's weights.

        Raises:
            UserError: it predicts something else, of another noise, shape or classes.
        """
        of_both = [
            (type(m.process), vars(m.process), m.network.sample_shape, m.num_classes, type(m.objective))
            for m in (teacher, self)
        ]
        if of_both[0] != of_both[1]:
            raise UserError("the outer teacher has another process, objective, shape of samples or number of classes")
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)  # not as a part, whose weights would be saved

    def _taught(self, prediction: Tensor, corrupted: Corrupted, labels: Tensor) -> Tensor:
        """Return the loss of L_max against the outer teacher, which sees the same corrupted batch."""
        teacher = self.teacher
        if teacher is None:
            raise UserError("outer_teacher names a model that was not loaded: `elt fit` loads it, or call learn_from")
        if teacher.device != prediction.device:
            teacher.to(prediction.device)
        condition = Condition(labels, corrupted.time)
        with torch.no_grad():
            wanted = teacher.network(corrupted.inputs, condition, teacher.max_loops).predictions[teacher.max_loops]
        return self.objective.distillation(prediction, wanted, corrupted).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take one step of training, and log the terms of its loss."""
        loss, terms = self.loss(batch, self.global_step, self.global_step / max(1, self.total_steps))
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch.x))
        return loss

    def on_validation_start(self) -> None:
        """Gather sharded weights: devices may have different numbers of batches and samples to judge them by."""
        gather_weights(self.network)

    def on_validation_epoch_end(self) -> None:
        """Go back to sharded weights; callbacks have drawn their samples by now."""
        release_weights(self.network)

    on_test_start = on_predict_start = on_validation_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compute nothing: the callback that knows at which loop counts measures by :meth:`held_out_losses`."""

    test_step = validation_step

    def held_out_losses(self, batch: Any, loops: Sequence[int]) -> dict[int, Tensor]:
        """Compute the ground-truth loss at several loop counts, all from one pass: {loops: mean over the batch}."""
        corrupted = self.objective.corrupt(batch.x, sample_seeds(self.seed, batch.indices), VAL_STEP)
        predictions, _ = self.network(corrupted.inputs, Condition(batch.labels, corrupted.time), max(loops), loops)
        return {count: self.objective.ground_truth(p, corrupted).mean() for count, p in predictions.items()}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Draw what a :class:`~elt_lightning.data.base.Request` asks for: codes (B, …)."""
        loops = batch.loops or self.max_loops
        return self.sample(batch.labels, loops, sample_seeds(self.seed, batch.indices), batch.known)

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
        """Draw samples with the module's sampler or another one.

        Args:
            labels: (B,) int64 in [0, num_classes].
            loops: a number, or one per sampling step.
            seeds: (B,) int64 from :func:`~elt_lightning.processes.noise.sample_seeds`.
            known: (B, …) what is given and must stay, or None.
            sampler: in place of the module's own.
            spent: takes the loops (B,) of each step, as :meth:`~elt_lightning.samplers.base.Sampler.sample` says.

        Returns:
            (B, …) tokens or latents; the data's tokenizer turns them into pixels.

        Raises:
            ValueError: the sampler carries the state or has a tolerance, and the network has no recall.
            UserError: what the network predicts is not finite; a training only warns of it, and goes on.
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
            if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
                raise UserError(f"{message}; try fewer loops, a wider --trainer.precision, or another checkpoint")
            logger.warning("%s; the scores of this validation say nothing", message)
        return samples

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

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over decaying and non-decaying parameters, and its schedule in optimiser steps.

        Raises:
            UserError: the optimiser refuses its settings, such as a learning rate below 0.
        """
        try:
            optimizer = prefer_fused(self.make_optimizer(parameter_groups(self.network)))
        except (ValueError, TypeError) as error:  # its settings are first used here
            raise UserError(f"model.optimizer refuses its settings: {error}") from error
        return with_schedule(optimizer, self.learning_rate_schedule, self.total_steps)

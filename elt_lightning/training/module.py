"""The LightningModule: the model, its optimiser, and what a training does with them; it does no mathematics."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from elt_lightning.errors import UserError
from elt_lightning.model import ELTModel
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.looped import CompileMode
from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition, drop_labels
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.training.optimiser import LearningRateSchedule, parameter_groups, prefer_fused, with_schedule
from elt_lightning.training.sharding import gather_weights, release_weights, shard
from elt_lightning.training.weights import check_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OuterTeacher:
    """A trained model that teaches L_max beside the data: the unlooped one that a looped one was made of."""

    path: str  # a checkpoint or model folder
    weight: float = 1.0  # of the distillation loss against it

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of the outer teacher must be above 0 and finite, not {self.weight}")


class ELTModule(ELTModel, LightningModule):
    """The model, trained so that every loop count is usable.

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
        super().__init__(network, process, objective, distillation, sampler, num_classes, seed)
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], not {class_dropout_prob}")
        self.class_dropout_prob, self.make_optimizer = class_dropout_prob, optimizer
        self.compile_mode = "default" if compile is True else compile
        self.learning_rate_schedule = learning_rate_schedule or LearningRateSchedule()
        self.outer_teacher = outer_teacher
        self.teacher: ELTModel | None = None
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
        check_weights(self.state_dict(), checkpoint["state_dict"])

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

    def learn_from(self, teacher: ELTModel) -> None:
        """Take the frozen model that ``outer_teacher`` names; it is no part of this module's weights.

        Raises:
            UserError: it predicts something else, of another noise, shape or classes.
        """
        theirs, ours = (
            {
                "process": (type(m.process), vars(m.process)),
                "objective": type(m.objective),
                "shape of samples": m.network.sample_shape,
                "number of classes": m.num_classes,
            }
            for m in (teacher, self)
        )
        if other := [name for name, value in ours.items() if value != theirs[name]]:
            raise UserError(f"the outer teacher has another {', another '.join(other)}")
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

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Draw what a :class:`~elt_lightning.data.base.Request` asks for: codes (B, …), and loops run (B, K)."""
        loops, spent = batch.loops or self.max_loops, list[Tensor]()
        codes = self.sample(batch.labels, loops, sample_seeds(self.seed, batch.indices), batch.known, spent=spent)
        return codes, torch.stack(spent, 1)

    def refuse_broken(self, message: str) -> None:
        """Warn of samples that are not finite where a training judges itself: it goes on; see :meth:`sample`."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            logger.warning("%s; the scores of this validation say nothing", message)
        else:
            super().refuse_broken(message)

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

"""Masked generation: hide tokens, predict them (paper, section 3.2, "masked generative models")."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.processes.base import check_process
from elt_lightning.processes.masking import MaskingProcess, cosine_mask_ratio, random_mask
from elt_lightning.processes.noise import Stream, batch_seed, uniform


class MaskedObjective(Objective):
    """Cross-entropy on hidden tokens, after a cosine share of them was hidden.

    The paper writes sums over masked positions; here each sample's loss is the mean over its positions, as in MaskGIT,
    so that its scale does not depend on how many were hidden.

    Args:
        process: has the mask token.
        label_smoothing: for the ground truth alone. MaskGIT 0.1, MAGVIT 1e-4.
        loss_on: "masked" positions (MaskGIT, the paper) or "all" of them (MAGVIT).
        ratio_per: one mask ratio per "sample" (MaskGIT) or per "batch" (MAGVIT).
    """

    def __init__(
        self,
        process: MaskingProcess,
        label_smoothing: float = 0.1,
        loss_on: Literal["masked", "all"] = "masked",
        ratio_per: Literal["sample", "batch"] = "sample",
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing}")
        check_process(self, process, MaskingProcess)
        super().__init__(process)
        self.hide = process.hide
        self.label_smoothing, self.loss_on, self.ratio_per = label_smoothing, loss_on, ratio_per

    def corrupt(self, x: Tensor, seeds: Tensor, step: int) -> Corrupted:
        """Hide ⌈cos(π/2·r)·T⌉ random tokens, r uniform: x (B, T) int64 in [0, V)."""
        progress = uniform(seeds if self.ratio_per == "sample" else batch_seed(seeds), step, Stream.MASK_RATIO)
        scores = uniform(seeds, step, Stream.MASK_ORDER, (x.shape[1],))
        masked = random_mask(cosine_mask_ratio(progress), scores)
        weight = masked if self.loss_on == "masked" else torch.ones_like(masked)
        return Corrupted(inputs=self.hide(x, masked), target=x, weight=weight.float())

    def ground_truth(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """Return −log P(y_i | x_mask), mean over the sample's positions that count: logits (B, T, V) to (B,)."""
        return self._mean_cross_entropy(prediction, corrupted.target, corrupted.weight, self.label_smoothing)

    def distillation(self, student: Tensor, teacher: Tensor, corrupted: Corrupted) -> Tensor:
        """Return −Σ_v P_teacher(v) · log P_student(v), mean over the same positions: logits (B, T, V) twice to (B,)."""
        return self._mean_cross_entropy(student, teacher.detach().float().softmax(-1), corrupted.weight, 0.0)

    @staticmethod
    def _mean_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, label_smoothing: float) -> Tensor:
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), target.flatten(0, 1), reduction="none", label_smoothing=label_smoothing
        )
        return (loss.view_as(weight) * weight).sum(1) / weight.sum(1)

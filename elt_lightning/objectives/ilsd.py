"""Intra-Loop Self Distillation, Algorithm 1 of the paper: the full loop count teaches a random smaller one.

    L_ILSD = L_GT(F_(N,L_max)(x), y)
             + λ·L_GT(F_(N,L_int)(x), y) + (1 − λ)·L_dist(F_(N,L_int)(x), stopgrad(F_(N,L_max)(x)))

Teacher and student are two exits of one forward pass; their gradients meet in the one set of shared weights.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from elt_lightning.errors import check_most
from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.processes.noise import Stream, integer

Mode = Literal["ilsd", "vanilla", "ground_truth", "distillation", "deep_supervision"]


class ILSD:
    """Choose the exits of a training step, and combine their losses.

    Args:
        max_loops: L_max, the loop count trained as the teacher. 1 is a plain transformer without a student.
        min_loops: L_min, the smallest loop count a student has.
        mode: which terms are trained, as in the paper's ablation (Figure 13).
            "ilsd": all three terms, λ falling linearly from 1 to 0 over training.
            "vanilla": the teacher's term alone.
            "ground_truth": the student learns from the data only (λ ≡ 1).
            "distillation": the student learns from the teacher only (λ ≡ 0).
            "deep_supervision": every loop count from L_min learns from the data in every step: weight 1 for the last
            and 1 / (L_max − L_min) for each of the others (as Looped-DiT, arXiv 2609.40305).

    Raises:
        ValueError: not 1 ≤ L_min < L_max (or both 1).
    """

    def __init__(self, max_loops: int, min_loops: int = 1, mode: Mode = "ilsd") -> None:
        if not (1 <= min_loops < max_loops or min_loops == max_loops == 1):
            raise ValueError(
                f"need 1 <= min_loops < max_loops (or both 1), not min_loops {min_loops}, max_loops {max_loops}"
            )
        check_most(max_loops=max_loops)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        self.max_loops, self.min_loops, self.mode = max_loops, min_loops, mode

    def student_exits(self, seed: int, step: int) -> tuple[int, ...]:
        """Choose the students of an optimiser step: L_int ~ Uniform{L_min, …, L_max − 1}.

        It is a hash of (seed, step): every rank and every accumulated micro-batch takes the same one, and so does a
        resumed run.
        """
        if self.max_loops == 1 or self.mode == "vanilla":
            return ()
        if self.mode == "deep_supervision":
            return tuple(range(self.min_loops, self.max_loops))
        return (integer(seed, step, Stream.STUDENT_EXIT, self.min_loops, self.max_loops),)

    def ground_truth_weight(self, progress: float) -> float:
        """Return λ = 1 − step/total, the student's weight on the data, at a progress in [0, 1] of training."""
        fixed = {"ground_truth": 1.0, "distillation": 0.0, "deep_supervision": 1.0}
        return fixed.get(self.mode, 1.0 - min(max(progress, 0.0), 1.0))

    def loss(
        self, predictions: dict[int, Tensor], corrupted: Corrupted, objective: Objective, progress: float
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Combine the losses of all exits.

        Args:
            predictions: {loops: prediction} for L_max and each of :meth:`student_exits`.
            corrupted: what the network was shown, and the truth.
            objective: L_GT and L_dist, one loss per sample.
            progress: share of training done, in [0, 1].

        Returns:
            the scalar loss, and its named terms, detached: ``loss``, ``loss_teacher``, and with a student
            ``lambda``, ``student_loops`` and, where the mode trains them, ``loss_student`` and ``loss_distill``, means
            over the students.
        """
        teacher = predictions[self.max_loops]
        loss = objective.ground_truth(teacher, corrupted).mean()
        terms: dict[str, Tensor | float] = {"loss_teacher": loss.detach()}
        students = {loops: prediction for loops, prediction in predictions.items() if loops != self.max_loops}
        if students:
            λ = self.ground_truth_weight(progress)
            terms |= {"lambda": λ, "student_loops": sum(students) / len(students)}
            if self.mode != "distillation":
                from_data = [objective.ground_truth(student, corrupted).mean() for student in students.values()]
                student_loss = torch.stack(from_data).mean()
                loss = loss + λ * student_loss
                terms["loss_student"] = student_loss.detach()
            if self.mode in ("ilsd", "distillation"):
                from_teacher = [objective.distillation(s, teacher, corrupted).mean() for s in students.values()]
                distillation_loss = torch.stack(from_teacher).mean()
                loss = loss + (1 - λ) * distillation_loss
                terms["loss_distill"] = distillation_loss.detach()
        return loss, {"loss": loss.detach()} | terms

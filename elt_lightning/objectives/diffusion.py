"""Diffusion in continuous time: add noise, predict what was clean (paper, section 3.2, "diffusion models")."""

from torch import Tensor

from elt_lightning.objectives.base import Corrupted, Objective
from elt_lightning.processes.base import check_process
from elt_lightning.processes.gaussian import (
    GaussianProcess,
    ShiftedCosine,
    add_noise,
    predicted,
    sigmoid_weight,
    weighted_square_error,
)
from elt_lightning.processes.noise import Stream, normal, uniform


class DiffusionObjective(Objective):
    """Squared error of x̂ under the sigmoid weighting, at uniform times, against the data and against the teacher.

    L_GT = w(t)·‖x̂_L − x‖² and L_dist = w(t)·‖x̂_L − x̂_teacher‖², with the one w(t) for both; means over a sample's
    elements, where the paper writes sums. For a network that predicts v or ε the same numbers are computed from the
    errors of v or ε: at one z, x̂ is linear in them with slope −σ or −σ/α, whose square goes into w(t). Subtracting two
    nearly equal x̂ would lose digits where there is little noise.

    Args:
        process: what the network predicts, "x", "v" or "epsilon", and a :class:`ShiftedCosine`.
        weight_bias: b of the sigmoid weighting. ELT's is not published; 2 is SiD2's value for 64×64 pixels (inferred).
    """

    def __init__(self, process: GaussianProcess, weight_bias: float = 2.0) -> None:
        check_process(self, process, GaussianProcess)
        if not isinstance(process.schedule, ShiftedCosine):
            raise ValueError(
                f"DiffusionObjective needs a ShiftedCosine as the process's schedule, not {process.schedule}"
            )
        super().__init__(process)
        self.prediction, self.schedule, self.weight_bias = process.prediction, process.schedule, weight_bias

    def corrupt(self, x: Tensor, seeds: Tensor, step: int) -> Corrupted:
        """Mix clean data x (B, …) with noise at a uniform time; ``target`` is what the network should predict."""
        time = uniform(seeds, step, Stream.TIME)
        noise = normal(seeds, step, Stream.NOISE, tuple(x.shape[1:]))
        logsnr = self.schedule.logsnr(time)
        alpha, sigma = self.schedule.amounts(logsnr)
        clean = x.float()
        weight = sigmoid_weight(self.prediction, logsnr, self.schedule.logsnr_slope(time), self.weight_bias)
        target = predicted(self.prediction, clean, noise, alpha, sigma)
        return Corrupted(inputs=add_noise(clean, noise, alpha, sigma), target=target, weight=weight, time=time)

    def ground_truth(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """Return w(t)·‖x̂ − x‖², mean over elements: prediction (B, …) to (B,)."""
        return weighted_square_error(prediction, corrupted.target, corrupted.weight)

    def distillation(self, student: Tensor, teacher: Tensor, corrupted: Corrupted) -> Tensor:
        """Return w(t)·‖x̂_student − x̂_teacher‖², mean over elements: (B, …) twice to (B,)."""
        return weighted_square_error(student, teacher.detach(), corrupted.weight)

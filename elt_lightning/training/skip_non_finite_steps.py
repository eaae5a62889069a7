"""Steps that would break the weights are not taken, and broken weights are not saved."""

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from elt_lightning.errors import UserError
from elt_lightning.training.runs import callbacks_of
from elt_lightning.training.weights import own_part

logger = logging.getLogger(__name__)


class SkipNonFiniteSteps(Callback):
    """Skip every optimiser step whose loss or total gradient norm is infinite or not a number.

    Such a step changes neither weights, the optimiser's moments nor an average: :func:`is_skipped` says so to all that
    follows a step. It counts as a step of training all
    the same, so that the next one meets other samples and other noise, and it is logged: ``train/skipped_steps`` is how
    many there were so far, those before a resumed checkpoint included. ``train/gradient_norm`` is the norm before
    clipping, over all devices.

    All devices decide alike: each looks at its own losses and at its gradients, or its shards of them, and one pair of
    numbers is summed over the devices. Reading it is the one time per step that this callback waits for the device.
    Losses of accumulated micro-batches are kept on the device until then.

    With a gradient scaler (fp16) the scaler skips such steps itself and lowers its scale; they are counted here too.

    Args:
        max_in_a_row: training stops after so many. A new scaler starts at 2¹⁶ and may skip 16 until it finds its scale.

    Raises:
        ValueError: ``max_in_a_row`` is below 1.
    """

    def __init__(self, max_in_a_row: int = 20) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be at least 1, not {max_in_a_row}")
        self.max_in_a_row = max_in_a_row
        self.skipped = self.in_a_row = 0
        self._loss: Tensor | float = 0.0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add up the losses of a step: the sum is finite only if each of them is."""
        self._loss = self._loss + loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the step before gradients are clipped (UserError: it is one too many in a row that is not finite)."""
        norm = get_total_norm(map(own_part, gradients(optimizer))).to(pl_module.device, torch.float32)
        bad = (~torch.isfinite(self._loss + norm)).float()
        self._loss = 0.0
        bad, squared = trainer.strategy.reduce(torch.stack([bad, norm.square()]), reduce_op="sum").tolist()
        if bad:
            self._skip(trainer, optimizer)
        else:
            self.in_a_row = 0
        mesh = pl_module.device_mesh  # (copies of the model, devices that share a copy); without one all are copies
        copies = trainer.world_size if mesh is None else mesh.size(0)
        pl_module.log_dict(
            {"train/skipped_steps": float(self.skipped), "train/gradient_norm": (squared / copies) ** 0.5}
        )

    def _skip(self, trainer: Trainer, optimizer: Optimizer) -> None:
        self.skipped += 1
        self.in_a_row += 1
        step = trainer.global_step + 1
        if self.in_a_row == 1:
            logger.warning("step %d is skipped: its loss or gradient is not finite", step)
        if self.in_a_row == self.max_in_a_row:
            raise UserError(
                f"training stops at step {step}: the last {self.in_a_row} steps were skipped, as their loss or "
                "gradient was not finite; lower the learning rate, clip gradients with --trainer.gradient_clip_val=1, "
                "or take --trainer.precision=bf16-mixed in place of 16-mixed; "
                f"{last_good_checkpoint(trainer)}"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            for gradient in gradients(optimizer):
                gradient.fill_(torch.nan)  # a fused optimiser looks for these itself, and must find some gradient
        else:
            optimizer.zero_grad(set_to_none=True)  # optimisers leave alone what has no gradient, weights and moments

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the weights themselves: a finite but enormous step may have broken them.

        Raises:
            UserError: not all of them are finite. Nothing is written then.
        """
        is_finite = all(bool(own_part(parameter).isfinite().all()) for parameter in pl_module.parameters())
        if not trainer.strategy.reduce_boolean_decision(is_finite, all=True):
            raise UserError(
                f"the weights of step {trainer.global_step} are not finite and are not saved: lower the learning rate; "
                f"{last_good_checkpoint(trainer)}"
            )

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.skipped = state_dict["skipped"]


def is_skipped(trainer: Trainer) -> bool:
    """Return whether the newest optimiser step was skipped; its weights are those of the step before."""
    return any(callback.in_a_row for callback in callbacks_of(trainer, SkipNonFiniteSteps))


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """List the gradients that an optimiser is about to use."""
    return [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]


def last_good_checkpoint(trainer: Trainer) -> str:
    """Return where the newest checkpoint of a run lies."""
    path = getattr(trainer.checkpoint_callback, "last_model_path", "")
    return f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"

"""Exponential moving average of the trained weights, used wherever the model is judged.

Lightning's own averaging callback stores the average as the model's weights, copies frozen parts and averages integer
buffers; this one keeps the average beside the model, under a key of its own in the checkpoint (``ema``).
"""

from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.training.sharding import as_sharded, release_weights
from elt_lightning.training.skip_non_finite_steps import is_skipped
from elt_lightning.training.weights import check_exported, differences


class EMA(Callback):
    """Average the trainable parameters after every optimiser step; swap the average in wherever the model is judged.

    The decay warms up as min(decay, (1 + t)/(10 + t)) after t steps, so that a short run is not dominated by its
    initial weights. It is kept in float32 at least: in bfloat16 the steps of a slow average are smaller than what its
    entries can tell apart, and it would stand still.

    Args:
        decay: of the average. MaskGIT 0.999.
        weights: "ema" or "raw": which weights are judged.
    """

    def __init__(self, decay: float = 0.999, weights: Literal["ema", "raw"] = "ema") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the average must lie in [0, 1), not {decay}")
        self.decay, self.weights = decay, weights
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self.is_exported = False
        """Whether the model has one set of weights, which are those that are judged."""
        self._raw: dict[str, Tensor] = {}
        """The raw weights, while the average is in their place."""

    @property
    def is_judged(self) -> bool:
        """Whether averaged weights are those that are judged."""
        return self.weights == "ema" and (bool(self.average) or self.is_exported)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the initial weights, unless a checkpoint gave an average."""
        for name, parameter in trainable_parameters(pl_module).items():
            known = self.average.get(name, parameter.detach().clone())
            self.average[name] = in_full(as_sharded(known, parameter), parameter)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average when an optimiser step was taken (accumulated micro-batches take none)."""
        if trainer.global_step > self.updates and not is_skipped(trainer):
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            parameters = trainable_parameters(pl_module)
            averages = [self.average[name] for name in parameters]
            torch._foreach_lerp_(averages, [in_full(weight, weight) for weight in parameters.values()], 1 - decay)
        self.updates = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back when validation is interrupted."""
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as ``checkpoint["ema"]``; ``state_dict`` holds the raw weights even during validation."""
        if not self.average:
            return
        checkpoint["state_dict"].update(self._raw)
        checkpoint["ema"] = {"updates": self.updates, "weights": self.average}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average from a checkpoint (UserError: of other weights; an exported model has the others alone)."""
        if "exported" in checkpoint:
            check_exported(checkpoint["exported"], self.weights)
            self.is_exported = True
        if "ema" in checkpoint:
            weights, here = checkpoint["ema"]["weights"], trainable_parameters(pl_module)
            if faults := differences(here, weights):
                raise UserError(f"the checkpoint's average is of another network, or is damaged: {faults}")
            self.average = {n: in_full(as_sharded(weights[n].clone(), p), p) for n, p in here.items()}
            self.updates = checkpoint["ema"]["updates"]

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule) -> None:
        """Put the average's values into the parameters, so that optimiser and graph keep their tensors."""
        if self.is_judged and self.average and not self._raw:
            release_weights(pl_module)
            parameters = trainable_parameters(pl_module)
            self._raw = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(as_sharded(self.average[name], parameter))

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        if self._raw:
            release_weights(pl_module)
            for name, parameter in trainable_parameters(pl_module).items():
                parameter.copy_(self._raw[name])
            self._raw = {}


def in_full(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor in the precision of a parameter's average: float32, or its own where that has more."""
    return tensor.to(torch.promote_types(parameter.dtype, torch.float32))


def trainable_parameters(pl_module: LightningModule) -> dict[str, torch.nn.Parameter]:
    """List the trainable parameters under the names they have in the module's state dict."""
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

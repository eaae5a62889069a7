"""Mixed precision for shared weights, and what Lightning's names of precisions mean."""

from typing import NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import Optimizer


class Types(NamedTuple):
    """What the trainer's ``precision`` means."""

    weights: torch.dtype  # type of weights, gradients, the optimiser's state and the average
    autocast: torch.dtype | None = None  # type that matrix products are brought to in a mixed precision, None otherwise

    @property
    def products(self) -> torch.dtype:
        """Type that matrix products are computed in."""
        return self.autocast or self.weights

    def context(self, device_type: str) -> torch.autocast:
        """Return the context to compute in, as :class:`CachedMixedPrecision` makes it."""
        return torch.autocast(device_type, self.autocast, self.autocast is not None, cache_enabled=True)


PRECISIONS = {
    "32-true": Types(torch.float32),
    "64-true": Types(torch.float64),
    "bf16-true": Types(torch.bfloat16),
    "16-true": Types(torch.float16),
    "bf16-mixed": Types(torch.float32, torch.bfloat16),
    "16-mixed": Types(torch.float32, torch.float16),
}
PRECISIONS |= {short: PRECISIONS[f"{short}-true"] for short in ("32", "64")}
PRECISIONS |= {short: PRECISIONS[f"{short}-mixed"] for short in ("bf16", "16")} | {"None": PRECISIONS["32-true"]}
"""Types by Lightning's names, the short ones with them."""


class CachedMixedPrecision(MixedPrecision):
    """Lightning's mixed precision, with autocast's cache on: a weight is cast once in a step, not once in every loop.

    Without the cache each loop keeps a copy of the shared weights in bfloat16 for the backward pass, and the memory of
    a looped model grows with loops as if its weights were not shared. The cache ends with the step's forward pass.

    In bfloat16 gradients are not scaled, so that a fused optimiser's can be clipped too.
    """

    def autocast_context_manager(self) -> torch.autocast:
        """Return autocast with its cache."""
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.half
        return torch.autocast(self.device, dtype=dtype, cache_enabled=True)

    def clip_gradients(self, optimizer: Optimizer, *args: object, **kwargs: object) -> None:
        """Clip; Lightning's own refuses fused optimisers even where no scaler is at work."""
        kind = MixedPrecision if self.scaler is not None else Precision
        kind.clip_gradients(self, optimizer, *args, **kwargs)  # type: ignore[arg-type]


def cache_weight_casts(trainer: Trainer) -> None:
    """Install the plugin above in a trainer in mixed precision; strategies with their own precision keep it."""
    plugin = trainer.precision_plugin
    if type(plugin) is MixedPrecision:
        trainer.strategy.precision_plugin = CachedMixedPrecision(plugin.precision, plugin.device, plugin.scaler)  # type: ignore[arg-type]

"""How the weights are moved: which ones decay, and how the learning rate goes."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from elt_lightning.errors import UserError


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters: kernels of linear and convolution layers decay; all others do not.

    The others are biases, norms and embeddings.

    Returns:
        two groups for an optimiser; the second has ``weight_decay`` 0.
    """
    kernels = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if id(parameter) in kernels]},
        {"params": [parameter for parameter in trainable if id(parameter) not in kernels], "weight_decay": 0.0},
    ]


def refuse_state_of_another(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse the state of another kind of optimiser: torch would take it, and break in the next step.

    Raises:
        UserError: settings of the one and of the other are unknown to one another.
    """
    for here, there in zip(optimizer.param_groups, state["param_groups"], strict=False):
        missing, unknown = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
        if missing and unknown:
            raise UserError(
                f"the checkpoint was trained with another optimiser, with settings such as {unknown[0]}, not "
                f"{missing[0]} as {type(optimizer).__name__} has: go on with the same one"
            )


FUSED_ON = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch has fused optimisers."""


def prefer_fused(optimizer: Optimizer) -> Optimizer:
    """Let an optimiser that can take its step in one kernel do so, unless it was told how.

    Args:
        optimizer: one of torch's, whose ``fused`` and ``foreach`` were left at None; any other stays as it is.
    """
    defaults = optimizer.defaults
    if "fused" in defaults and defaults["fused"] is None and defaults["foreach"] is None:
        for group in optimizer.param_groups:
            weights = group["params"]
            on_sharded = isinstance(optimizer, Adam) or not any(isinstance(w, DTensor) for w in weights)
            group["fused"] = on_sharded and all(w.is_floating_point() and w.device.type in FUSED_ON for w in weights)
    return optimizer


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up, then constant or a half cosine down to a share of the peak.

    Attributes:
        warmup_steps: optimiser steps from 0 to the peak. MaskGIT and MAGVIT use 5000.
        decay: "constant" or "cosine".
        final_share: of the peak, where the cosine ends.
    """

    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final_share: float = 0.0

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate at an optimiser step (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

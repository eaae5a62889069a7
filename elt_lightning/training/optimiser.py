"""How the weights are moved: which ones decay, and how the learning rate goes."""

import inspect
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from elt_lightning.errors import UserError
from elt_lightning.training.weights import own_part


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


def with_schedule(optimizer: Optimizer, schedule: "LearningRateSchedule", total_steps: int) -> OptimizerLRScheduler:
    """Return an optimiser with its schedule in optimiser steps, as a LightningModule gives them to its trainer.

    When resumed, both take their state from the checkpoint and their settings from here.
    """
    optimizer.register_load_state_dict_pre_hook(with_settings_of)
    scheduler = _Schedule(optimizer, lambda step: schedule.factor(step, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Schedule(LambdaLR):
    """Takes only the step from a checkpoint, where torch takes the peak learning rates too."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [peak * factor for peak, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def with_settings_of(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state with the settings that an optimiser has here: learning rate, decay, betas and so on.

    Raises:
        UserError: the state is not one that this optimiser with these settings makes, or is damaged. torch would take
            it, and break in the next step or begin anew without a word.
    """
    name = type(optimizer).__name__
    for here, there in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        missing, unknown = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
        if missing and unknown:
            raise UserError(
                f"the checkpoint was trained with another optimiser, with settings such as {unknown[0]}, not "
                f"{missing[0]} as {name} has: go on with the same one"
            )
    numbers = [group["params"] for group in saved["param_groups"]]
    if [len(group) for group in numbers] != [len(group["params"]) for group in optimizer.param_groups] or not (
        saved["state"].keys() <= set(chain.from_iterable(numbers))
    ):
        raise UserError("the checkpoint's optimiser is of other weights, or is damaged: go on from another checkpoint")
    layouts = state_layouts(optimizer)
    for place, number in enumerate(chain.from_iterable(numbers)):
        state = saved["state"].get(number) or {}  # a weight that never had a gradient has none
        if layouts is not None and state and state.keys() != layouts[place].keys():
            raise UserError(
                f"the checkpoint was trained with another optimiser, or one with settings that cannot change: it keeps "
                f"{_listed(state)} of a weight, and {name} as it is set here {_listed(layouts[place])}"
            )
        for entry, value in state.items():
            if fault := _fault(entry, value, value if layouts is None else layouts[place][entry]):
                raise UserError(
                    f"the checkpoint's optimiser is damaged, or of other weights: {entry} of weight {number} {fault}"
                )
    groups = [dict(here, params=there) for here, there in zip(optimizer.param_groups, numbers, strict=True)]
    return {"state": saved["state"], "param_groups": groups}


def state_layouts(optimizer: Optimizer) -> list[dict[str, Any]] | None:
    """Find out what an optimiser keeps for each weight, by a step of its twin on tensors without memory.

    Returns:
        {name: value} for each weight in order, tensors of the right shapes without content; None for an optimiser
        that cannot step that way.
    """
    alone: dict[str, Any] = {name: False for name in ("fused", "foreach", "capturable") if name in optimizer.defaults}
    groups = [
        group | alone | {"params": [torch.empty(w.shape, dtype=w.dtype, device="meta") for w in group["params"]]}
        for group in optimizer.param_groups
    ]
    weights = list(chain.from_iterable(group["params"] for group in groups))
    taken = inspect.signature(type(optimizer)).parameters
    try:
        twin = type(optimizer)(groups, **{name: v for name, v in (optimizer.defaults | alone).items() if name in taken})
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        twin.step()
    except Exception:  # one that looks at its gradients, for example
        return None
    return [dict(twin.state[weight]) for weight in weights]


def _listed(state: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, state))) or "nothing"


def _fault(name: str, value: Any, expected: Any) -> str:
    """Return what is wrong with an entry of an optimiser's state; "" for nothing."""
    if isinstance(value, Tensor) and isinstance(expected, Tensor):
        if value.shape != expected.shape:
            return f"has shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        if value.is_floating_point() != expected.is_floating_point():
            return f"is of {value.dtype}, not {expected.dtype}"
        numbers = own_part(value)
    elif type(value) is not type(expected):
        return f"is a {type(value).__name__}, not a {type(expected).__name__}"
    elif isinstance(value, int | float):
        numbers = torch.tensor(value)
    else:
        return ""
    if not numbers.isfinite().all():
        return "is not finite"
    return "is below 0" if name == "step" and bool((numbers < 0).any()) else ""


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
        """Return the share of the peak learning rate at an optimiser step (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

"""What a training will need, worked out before it starts: multiply–accumulates (MACs), memory and GPU-hours.

Nothing here needs data, weights or a GPU. Bytes are exact for what they name; hours rest on an assumed speed.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What torch.export traces with: private by name, and the one way to follow real storages without their memory.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from elt_lightning.data.base import Batch
from elt_lightning.errors import UserError
from elt_lightning.evaluation.sweep import swept_settings
from elt_lightning.networks.blocks import SelfAttention
from elt_lightning.training.module import ELTModule
from elt_lightning.training.precision import PRECISIONS, Types


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass of a training step keeps for the backward pass, weights themselves left out."""

    per_sample: int  # activations of each sample of a pass
    # the same with ``activation_checkpointing``: what loops begin with, and one loop that is computed again
    recomputing: int
    copies: int  # weights in autocast's type, one copy of each, however many samples there are


MOST_REHEARSED = 32
"""Loops that a rehearsal runs; what more of them keep follows from a few."""


def rehearse(module: ELTModule, types: Types) -> Kept:
    """Count what a training step keeps at any loop count; see :func:`rehearse_at`, which many loops are taken from."""
    loops, exits = module.max_loops, module.distillation.student_exits(module.seed, 0)
    if loops <= MOST_REHEARSED:
        return rehearse_at(module, types, loops, exits)
    few, some = 3, range(1, 1 + min(1, len(exits)))  # every further loop, or exit, keeps as much as the one before it
    base = astuple(rehearse_at(module, types, few, some))
    further_loop = astuple(rehearse_at(module, types, few + 1, some))
    further_exit = astuple(rehearse_at(module, types, few, range(1, 3))) if len(exits) > 1 else base
    return Kept(
        *(
            size + (loops - few) * (with_loop - size) + (len(exits) - len(some)) * (with_exit - size)
            for size, with_loop, with_exit in zip(base, further_loop, further_exit, strict=True)
        )
    )


def rehearse_at(module: ELTModule, types: Types, loops: int, exits: Sequence[int]) -> Kept:
    """Compute a training step's loss on the CPU, on tensors without contents, and count what autograd keeps of it.

    Dispatch and storages are those of a real run; memory and arithmetic are not spent. Where a CPU keeps something else
    than a GPU, it is brought to what a GPU does: fused attention keeps no attention matrix, with dropout neither;
    dropout keeps a mask of bytes; autocast computes layer norms in float32.

    ``loops`` are the teacher's and ``exits`` the students'; the module, best on the ``meta`` device, is not changed.
    """
    module = copy.deepcopy(module)
    module.outer_teacher = None  # of a frozen model nothing is kept
    module.distillation.max_loops = loops
    module.distillation.student_exits = lambda *_: tuple(exits)  # type: ignore[method-assign]  # it asks for a number
    network = module.network.to(device="meta", dtype=types.weights).train()
    for part in network.modules():
        if isinstance(part, SelfAttention):
            part.dropout = 0.0
        if isinstance(part, nn.Dropout) and part.p > 0:
            part.register_forward_hook(partial(_dropout_on_a_gpu, part.p))
            part.p = 0.0
        if isinstance(part, nn.LayerNorm) and types.autocast is not None:
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    without_contents = FakeTensorMode(allow_non_fake_inputs=True)  # one mode for all: another would copy the weights
    with without_contents:
        network.to_empty(device="cpu")
    weights = {_address(weight) for weight in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}
    states: list[Tensor] = []

    def keep_beginning(layers: nn.Module, inputs: tuple[Any, ...]) -> None:
        h, _, recalled = inputs
        states.extend([h] if recalled is None else [h, recalled.drive])

    network.backbone.layers.register_forward_pre_hook(keep_beginning)

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in weights:
            kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    def kept_bytes(num_samples: int, recompute: bool) -> int:
        kept.clear()
        states.clear()
        network.backbone.activation_checkpointing = recompute
        dtype = torch.float32 if module.codebook_size is None else torch.int64
        with without_contents, types.context("cpu"), saved_tensors_hooks(keep, lambda tensor: tensor):
            index = torch.arange(num_samples)
            batch = Batch(torch.zeros(num_samples, *network.sample_shape, dtype=dtype), torch.zeros_like(index), index)
            module.loss(batch, step=0, progress=0.5)
            for state in states if recompute else ():  # which the function that recomputes a loop keeps, unseen
                keep(state)
            return sum(storage.nbytes() for storage in kept.values())

    two, three = kept_bytes(2, recompute=False), kept_bytes(3, recompute=False)
    per_sample = three - two
    without_loops = kept_bytes(3, recompute=True) - kept_bytes(2, recompute=True)
    loop = (per_sample - without_loops) // module.max_loops + states[0].nbytes // 2  # its beginning, of two samples
    return Kept(per_sample, without_loops + loop, two - 2 * per_sample)


def _dropout_on_a_gpu(rate: float, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    return torch.native_dropout(inputs[0], rate, train=True)[0]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Settings:
    """What config and command line decide beside the model."""

    precision: str | int | None  # Lightning's name of it
    devices: int  # how many, over all nodes
    micro_batch_size: int  # samples of one pass on one device
    batch_size: int  # samples of an optimiser step
    steps: int  # optimiser steps
    num_validations: int  # how often training stops to validate
    num_validation_samples: int  # drawn at each loop count in each validation
    num_val: int  # samples whose losses are measured in each validation
    # drawn at each loop count and setting of the sampler by `elt test`: all repeats
    num_test_samples: int
    loops: Sequence[int]  # loop counts that are measured
    swept: Mapping[str, Sequence[Any] | None]  # {setting of the sampler: its values in `elt test`, or None}
    num_checkpoints: int  # how many are kept
    tflops: float  # assumed peak of a device, 10¹² floating-point operations per second
    utilisation: float  # assumed share of it in (0, 1]
    device_memory: float  # GiB of a device


def make_plan(module: ELTModule, settings: Settings) -> dict[str, Any]:
    """Work out what a training needs, as plain data, of a module that is best built on the ``meta`` device.

    On top of ``memory``, bytes on one device at the end of a pass's forward half, where most is held, come temporary
    buffers of single operations, the CUDA context and gaps between allocations. Keys that end in ``recomputing`` are
    the same with ``activation_checkpointing``; MACs, hours and samples by loops are {loops: amount}.

    Raises:
        UserError: the precision is not known here, or a setting of the sampler is not possible.
    """
    types = PRECISIONS.get(str(settings.precision))
    if types is None:
        known = ", ".join(name for name in PRECISIONS if "-" in name)
        raise UserError(f"elt plan knows the precisions {known}, not {settings.precision}")
    network, kept = module.network, rehearse(module, types)
    backbone, parameters = module.num_parameters()
    weights = parameters * types.weights.itemsize
    average = parameters * torch.promote_types(types.weights, torch.float32).itemsize
    state = round(weights * optimizer_bytes_per_byte(module, types.weights))
    resident = {  # bytes on a device whatever the batch
        "weights": weights,
        "gradients": weights,
        "gradients again, to exchange them (DDP)": weights if settings.devices > 1 else 0,
        "the optimiser's state": state,
        "averaged weights": average,
        f"copies in {str(types.products).removeprefix('torch.')}": kept.copies,
    }
    teacher, taught = module.teacher, 0
    if teacher is not None:
        resident["the outer teacher's weights"] = sum(weight.nbytes for weight in teacher.network.parameters())
        taught = teacher.network.macs(teacher.max_loops)
    fixed = sum(resident.values())
    room = max(0, round(settings.device_memory * 2**30) - fixed)

    loops, exits = module.max_loops, module.distillation.student_exits(module.seed, 0)
    again = (network.macs(2) - network.macs(1)) * loops if network.backbone.activation_checkpointing else 0
    # Forward, backward (twice as much), loops computed again, the outer teacher.
    image = 3 * network.macs(loops, exits) + again + taught
    try:
        drawn, _ = swept_settings(settings.loops, module.sampler, {}, network.has_recall)
        tested, _ = swept_settings(settings.loops, module.sampler, settings.swept, network.has_recall)
    except ValueError as error:
        raise UserError(str(error)) from error
    sample = {count: module.macs_per_sample(count, sampler) for count, sampler in drawn}
    val = settings.num_val * network.macs(max(settings.loops), settings.loops)
    validation = settings.num_validation_samples * sum(sample.values()) + val

    def hours(macs: int) -> float:
        return 2 * macs / (settings.tflops * 1e12 * settings.utilisation) / 3600

    return {
        "settings": asdict(settings),
        "parameters_backbone": backbone,  # which the paper's tables report
        "parameters": parameters,
        "forward_macs": {count: network.macs(count) for count in settings.loops},  # of one pass of one sample
        "sample_macs": sample,
        "image_macs": image,  # of a training image
        "resident": resident,
        "kept": asdict(kept),
        "memory": fixed + settings.micro_batch_size * kept.per_sample,
        "memory_recomputing": fixed + settings.micro_batch_size * kept.recomputing,
        "largest_batch": room // kept.per_sample,  # samples of a pass that ``device_memory`` holds
        "largest_batch_recomputing": room // kept.recomputing,
        "checkpoint_bytes": weights + average + state,
        "training_hours": hours(image * settings.steps * settings.batch_size),  # GPU-hours, as the next two
        "validation_hours": hours(validation * settings.num_validations),
        "test_hours": {
            count: hours(
                settings.num_test_samples
                * sum(module.macs_per_sample(loops, sampler) for loops, sampler in tested if loops == count)
            )
            for count in settings.loops
        },
    }


def optimizer_bytes_per_byte(module: ELTModule, dtype: torch.dtype) -> float:
    """Measure the state that the module's optimiser keeps for a byte of weights, by a step on a small matrix."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = module.make_optimizer([{"params": [weight]}])
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.nbytes for value in state) / weight.nbytes

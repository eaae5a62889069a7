"""What a training will need, worked out before it starts: multiply–accumulates, memory, disk and GPU-hours.

Nothing here needs data, weights or a GPU. Networks are counted where they were built on the ``meta`` device, and
rehearsed on tensors that have shapes, types and storages but no contents. Bytes are exact for what they name; hours
rest on an assumed speed.
"""

import copy
import io
import math
import tarfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What torch.export traces with: private by name, and the one way to follow real storages without their memory.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from elt_lightning.data.crops import Picture
from elt_lightning.data.encode import ShardWriter
from elt_lightning.errors import UserError
from elt_lightning.networks.blocks import SelfAttention
from elt_lightning.objectives.base import Corrupted
from elt_lightning.processes.conditioning import Condition
from elt_lightning.training.module import ELTModule

FLOPS_PER_MAC = 2
BACKWARD = 2
"""Forward passes that a backward pass costs: each product has two gradients, of its input and of its weight."""


@dataclass(frozen=True)
class Precision:
    """What the trainer's ``precision`` means for memory.

    Attributes:
        weights: type of weights, gradients and the optimiser's state; the average is float32 at least.
        autocast: type that matrix products are brought to in a mixed precision, None otherwise.
    """

    weights: torch.dtype
    autocast: torch.dtype | None = None

    @staticmethod
    def named(name: str | int | None) -> "Precision":
        """Look up one of Lightning's names, for example "bf16-mixed".

        Raises:
            UserError: a precision that is not known here.
        """
        if str(name) not in PRECISIONS:
            known = ", ".join(known for known in PRECISIONS if "-" in known)
            raise UserError(f"elt plan knows the precisions {known}, not {name}")
        return PRECISIONS[str(name)]


PRECISIONS = {
    "32-true": Precision(torch.float32),
    "64-true": Precision(torch.float64),
    "bf16-true": Precision(torch.bfloat16),
    "16-true": Precision(torch.float16),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16),
    "16-mixed": Precision(torch.float32, torch.float16),
}
PRECISIONS |= {short: PRECISIONS[f"{short}-true"] for short in ("32", "64")}
PRECISIONS |= {short: PRECISIONS[f"{short}-mixed"] for short in ("bf16", "16")} | {"None": PRECISIONS["32-true"]}


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass.

    Attributes:
        per_sample: for each sample of the pass: activations.
        fixed: however many samples there are: copies of weights in autocast's type, one of each with its cache.
    """

    per_sample: int
    fixed: int

    def __sub__(self, other: "Kept") -> "Kept":
        return Kept(self.per_sample - other.per_sample, self.fixed - other.fixed)

    def __mul__(self, times: int) -> "Kept":
        return Kept(self.per_sample * times, self.fixed * times)


@dataclass(frozen=True)
class Activations:
    """What a training step keeps for its backward pass, weights themselves left out.

    Attributes:
        loop: one application of the shared layers.
        ends: all else: embedding, the heads of teacher and students, the losses.
        states: with ``checkpoint_loops``, what each loop began with, and what is recalled.
    """

    loop: Kept
    ends: Kept
    states: Kept


class Rehearsal:
    """Runs a module's network and training loss on the CPU, on tensors without contents.

    Dispatch, storages and what autograd keeps are those of a real run; memory and arithmetic are not spent. Where a CPU
    keeps something else than a GPU, it is brought to what a GPU does: fused attention keeps no attention matrix, with
    dropout neither; dropout keeps a mask of bytes; autocast computes layer norms in float32.

    Args:
        module: on the ``meta`` device, or a small one; it is not changed. Its network has a :class:`LoopedStack` called
            ``backbone``.
        precision: of the training.
    """

    def __init__(self, module: ELTModule, precision: Precision) -> None:
        self.module, self.precision = module, precision
        self.network = copy.deepcopy(module.network).to(device="meta", dtype=precision.weights)
        for part in self.network.modules():
            if isinstance(part, SelfAttention):
                part.dropout = 0.0
            if isinstance(part, nn.Dropout) and part.p > 0:
                part.register_forward_hook(partial(_dropout_on_a_gpu, part.p))
                part.p = 0.0
            if isinstance(part, nn.LayerNorm) and precision.autocast is not None:
                part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.network.train()
        # One mode for all runs: another one would copy the weights.
        self._without_contents = FakeTensorMode(allow_non_fake_inputs=True)
        with self._without_contents:
            self.network.to_empty(device="cpu")

    def activations(self) -> Activations:
        """Count what a training step keeps, at L_max with the students of a step."""
        loops, students = self.module.max_loops, self.module.distillation.student_exits(self.module.seed, 0)
        loop = self._kept(2) - self._kept(1)
        ends = self._kept(loops, students, with_loss=True) - loop * loops
        recomputed = self._kept(loops, students, with_loss=True, recompute=True)
        return Activations(loop=loop, ends=ends, states=recomputed - ends)

    def step(self) -> Kept:
        """Count what a training step keeps in all, at L_max with the students of a step."""
        students = self.module.distillation.student_exits(self.module.seed, 0)
        return self._kept(self.module.max_loops, students, with_loss=True)

    def _kept(self, loops: int, exits: Sequence[int] = (), with_loss: bool = False, recompute: bool = False) -> Kept:
        two, three = (self._kept_bytes(count, loops, exits, with_loss, recompute) for count in (2, 3))
        return Kept(per_sample=three - two, fixed=two - 2 * (three - two))

    def _kept_bytes(self, num_samples: int, loops: int, exits: Sequence[int], with_loss: bool, recompute: bool) -> int:
        network, autocast = self.network, self.precision.autocast
        backbone = network.backbone
        backbone.checkpoint_loops = recompute
        weights = {_address(weight) for weight in (*network.parameters(), *network.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _address(tensor) not in weights:
                kept[_address(tensor)] = tensor.untyped_storage()
            return tensor

        def keep_loop(layers: nn.Module, inputs: tuple[Any, ...]) -> None:
            h, _, recalled = inputs
            keep(h)
            if recalled is not None:
                keep(recalled.drive)

        with ExitStack() as stack:
            stack.enter_context(self._without_contents)
            corrupted, condition = self._batch(num_samples)
            if recompute:  # what a loop begins with is kept by the function that recomputes it
                stack.callback(backbone.layers.register_forward_pre_hook(keep_loop).remove)
            stack.enter_context(torch.autocast("cpu", autocast, autocast is not None, cache_enabled=True))
            stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
            predictions, _ = network(corrupted.inputs, condition, loops, exits)
            if with_loss:
                self.module.distillation.loss(predictions, corrupted, self.module.objective, progress=0.5)
            return sum(storage.nbytes() for storage in kept.values())

    def _batch(self, num_samples: int) -> tuple[Corrupted, Condition]:
        """Make a batch as training meets it: tokens where the objective knows of codes, latents otherwise."""
        has_tokens = hasattr(self.module.objective, "num_codes")
        x = torch.zeros(num_samples, *self.network.sample_shape, dtype=torch.int64 if has_tokens else torch.float32)
        corrupted = self.module.objective.corrupt(x, torch.arange(num_samples), step=0)
        return corrupted, Condition(torch.zeros(num_samples, dtype=torch.int64), corrupted.time)


def _dropout_on_a_gpu(rate: float, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    return torch.native_dropout(inputs[0], rate, train=True)[0]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the end of a forward pass of training, where most is held.

    What single operations need for a moment, the CUDA context and gaps between allocations come on top.

    Attributes:
        weights: of the network.
        gradients: of all of them, as they are from the second pass on.
        gradient_buckets: what gradients are exchanged in by several devices.
        optimizer_state: for example AdamW's two moments.
        average: the averaged weights, which lie on the same device.
        weight_copies: in autocast's type.
        loops: activations of the loops, or of the one that is being recomputed.
        states: with ``checkpoint_loops``, what each loop began with, and what is recalled.
        ends: embedding, heads and losses.
    """

    weights: int
    gradients: int
    gradient_buckets: int
    optimizer_state: int
    average: int
    weight_copies: int
    loops: int
    states: int
    ends: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Work:
    """Something computed many times over.

    Attributes:
        macs: multiply–accumulates of one time.
        count: how many times.
    """

    macs: int
    count: int

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply–accumulate."""
        return FLOPS_PER_MAC * self.macs * self.count

    def gpu_hours(self, flops_per_second: float) -> float:
        """Hours on one GPU at that speed."""
        return self.flops / flops_per_second / 3600


@dataclass(frozen=True)
class TrainingMacs:
    """Multiply–accumulates of one training image.

    Attributes:
        forward: a pass with L_max loops.
        students: the further heads of a step's students.
        recomputed: with ``checkpoint_loops``, the loops that are computed again; 0 without.
    """

    forward: int
    students: int
    recomputed: int

    @property
    def total(self) -> int:
        """Forward, backward (twice as much), and what is recomputed."""
        return (1 + BACKWARD) * (self.forward + self.students) + self.recomputed


@dataclass(frozen=True)
class Codes:
    """What `elt encode` keeps of one picture.

    Attributes:
        shape: (tokens,), or (channels, rows, columns), of moments with twice the latents' channels.
        is_tokens: tokens, or latents; both take two bytes a number.
    """

    shape: tuple[int, ...]
    is_tokens: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers alone, without a mirror image."""
        return 2 * math.prod(self.shape)

    def bytes_in_shard(self, copies: int) -> int:
        """Bytes of a picture's two members in a tar, written as `elt encode` writes them."""
        codes = np.zeros((copies, *self.shape), np.int16 if self.is_tokens else np.float16)
        with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            ShardWriter(tar).add(Picture("n01440764/n01440764_10026.JPEG", path=""), codes)
            return tar.offset


@dataclass(frozen=True)
class Settings:
    """What config and command line decide beside the model.

    Attributes:
        precision: Lightning's name of it.
        devices: how many, over all nodes.
        micro_batch_size: samples of one pass on one device.
        batch_size: samples of an optimiser step.
        steps: optimiser steps.
        steps_said: where their number comes from, in words.
        num_validations: how often training stops to validate.
        num_validation_samples: drawn at each loop count in each validation.
        num_held_out: samples whose losses are measured in each validation.
        num_test_samples: drawn at each loop count and guidance scale by `elt test`, all repeats, from zero and carried.
        loops: loop counts that are measured.
        guidance: guidance scales of `elt test`; None for the sampler's own.
        num_checkpoints: how many are kept.
        tflops: assumed peak of a device, 10¹² floating-point operations per second.
        utilisation: assumed share of it in (0, 1].
    """

    precision: str | int | None
    devices: int
    micro_batch_size: int
    batch_size: int
    steps: int
    steps_said: str
    num_validations: int
    num_validation_samples: int
    num_held_out: int
    num_test_samples: int
    loops: Sequence[int]
    guidance: Sequence[float] | None
    num_checkpoints: int
    tflops: float
    utilisation: float

    @property
    def flops_per_second(self) -> float:
        """Speed that is reckoned with."""
        return self.tflops * 1e12 * self.utilisation


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    Attributes:
        settings: it was worked out for.
        parameters_backbone: of the shared backbone, which the paper's tables report.
        parameters: of the whole network.
        max_loops: L_max.
        sampling_steps: of the sampler.
        guidance_scale: its scale.
        passes_per_sample: both branches of guidance counted.
        forward_macs: {loops: multiply–accumulates of one pass of one sample}.
        sample_macs: {loops: of drawing one sample}.
        image_macs: of one training image.
        activations: what a step keeps.
        memory: {``checkpoint_loops``: bytes on one device}.
        checkpoint_loops: how the config has it.
        checkpoint_bytes: of one checkpoint file.
        training: images of all steps.
        validation: validations.
        test: {loops: samples of `elt test`}.
    """

    settings: Settings
    parameters_backbone: int
    parameters: int
    max_loops: int
    sampling_steps: int
    guidance_scale: float
    passes_per_sample: int
    forward_macs: dict[int, int]
    sample_macs: dict[int, int]
    image_macs: TrainingMacs
    activations: Activations
    memory: dict[bool, Memory]
    checkpoint_loops: bool
    checkpoint_bytes: int
    training: Work
    validation: Work
    test: dict[int, Work]

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain data, with totals and GPU-hours."""
        speed = self.settings.flops_per_second
        content = asdict(self)
        for name in ("training", "validation"):
            content[name]["gpu_hours"] = getattr(self, name).gpu_hours(speed)
        for loops, work in self.test.items():
            content["test"][loops]["gpu_hours"] = work.gpu_hours(speed)
        content["image_macs"]["total"] = self.image_macs.total
        content["memory"] = {
            "checkpointed" if recompute else "all_kept": asdict(memory) | {"total": memory.total}
            for recompute, memory in self.memory.items()
        }
        return content


def make_plan(module: ELTModule, settings: Settings) -> Plan:
    """Work out what a training needs.

    Args:
        module: best built on the ``meta`` device, where it takes no memory.
        settings: how it is trained and measured.

    Raises:
        UserError: the precision is not known here.
    """
    precision = Precision.named(settings.precision)
    rehearsal = Rehearsal(module, precision)
    activations, network = rehearsal.activations(), module.network
    recomputes = network.backbone.checkpoint_loops
    backbone, parameters = module.num_parameters()
    weights = parameters * precision.weights.itemsize
    average = parameters * torch.promote_types(precision.weights, torch.float32).itemsize
    state = round(weights * optimizer_bytes_per_byte(module, precision.weights))
    max_loops, students = module.max_loops, module.distillation.student_exits(module.seed, 0)
    image = TrainingMacs(
        forward=network.macs(max_loops),
        students=network.macs(max_loops, students) - network.macs(max_loops),
        recomputed=(network.macs(2) - network.macs(1)) * max_loops if recomputes else 0,
    )

    def memory(recompute: bool) -> Memory:
        held = 1 if recompute else max_loops
        return Memory(
            weights=weights,
            gradients=weights,
            gradient_buckets=weights if settings.devices > 1 else 0,
            optimizer_state=state,
            average=average,
            weight_copies=activations.loop.fixed * held + activations.ends.fixed,
            loops=activations.loop.per_sample * held * settings.micro_batch_size,
            states=activations.states.per_sample * settings.micro_batch_size if recompute else 0,
            ends=activations.ends.per_sample * settings.micro_batch_size,
        )

    sample = {loops: module.macs_per_sample(loops) for loops in settings.loops}
    held_out_macs = network.macs(max(settings.loops), settings.loops)
    validation = settings.num_validation_samples * sum(sample.values()) + settings.num_held_out * held_out_macs
    samplers = [module.sampler.with_guidance_scale(scale) for scale in settings.guidance or ()] or [module.sampler]
    return Plan(
        settings=settings,
        parameters_backbone=backbone,
        parameters=parameters,
        max_loops=max_loops,
        sampling_steps=module.sampler.steps,
        guidance_scale=module.sampler.guidance.scale,
        passes_per_sample=len(module.sampler.network_calls(max_loops)),
        forward_macs={loops: network.macs(loops) for loops in settings.loops},
        sample_macs=sample,
        image_macs=image,
        activations=activations,
        memory={recompute: memory(recompute) for recompute in (False, True)},
        checkpoint_loops=recomputes,
        checkpoint_bytes=weights + state + average,  # raw weights, the optimiser's state, averaged weights
        training=Work(image.total, settings.steps * settings.batch_size),
        validation=Work(validation, settings.num_validations),
        test={
            loops: Work(sum(module.macs_per_sample(loops, sampler) for sampler in samplers), settings.num_test_samples)
            for loops in settings.loops
        },
    )


def optimizer_bytes_per_byte(module: ELTModule, dtype: torch.dtype) -> float:
    """Measure the state that the module's optimiser keeps for a byte of weights, by a step on a small matrix."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = module.make_optimizer([{"params": [weight]}])
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.nbytes for value in state) / weight.nbytes

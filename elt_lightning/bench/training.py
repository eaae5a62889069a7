"""A training step with ILSD, of vanilla looping, and of the unlooped model of equal depth: time and memory."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from elt_lightning.bench.memory import peak_above_start
from elt_lightning.bench.shapes import Network, Shape, num_bytes, twin
from elt_lightning.bench.timing import SideBySide, Work, matmuls, peak_flops
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.planning import BACKWARD, FLOPS_PER_MAC, Precision
from elt_lightning.processes.conditioning import Condition, drop_labels
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.training.optimiser import parameter_groups, prefer_fused

Way = Literal["ilsd", "vanilla", "unlooped"]


class Contender(NamedTuple):
    """One of those that take turns.

    Attributes:
        way: how the step is made.
        compile: mode of `torch.compile`, "no" without it.
        checkpoint_loops: whether each loop is computed again in the backward pass.
    """

    way: Way
    compile: str
    checkpoint_loops: bool


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        num_layers: N.
        loops: L_max, one after the other.
        batch_sizes: samples of a step.
        compile: "no", and modes of `torch.compile`.
        checkpoint_loops: without, with, or both. The unlooped model has one loop, where it saves nothing: it goes
            without.
        precision: Lightning's name of it.
        rounds: turns of every contender.
        turn_seconds: that a turn takes at least.
        device: where.
    """

    num_layers: int
    loops: Sequence[int]
    batch_sizes: Sequence[int]
    compile: Sequence[str]
    checkpoint_loops: Sequence[bool]
    precision: str
    rounds: int
    turn_seconds: float
    device: torch.device


class Trained:
    """A network with its optimiser, in the order of work that Lightning has.

    That order is forward, forget the gradients of the step before, backward, clip, step: during the forward pass
    weights, gradients and the optimiser's state are all there.
    """

    def __init__(self, network: Network) -> None:
        self.network = network.train()
        self.optimizer: Optimizer = prefer_fused(torch.optim.AdamW(parameter_groups(network), lr=1e-6))

    def resident_bytes(self) -> int:
        """Bytes of weights and the optimiser's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return num_bytes(self.network) + sum(value.nbytes for value in states)


class Step:
    """A training step.

    Args:
        shape: of the network.
        trained: the weights, their optimiser.
        network: the same network, or a compiled or checkpointed twin of it.
        distillation: ILSD, or vanilla looping.
        settings: precision and device.
        batch_size: samples.
    """

    def __init__(
        self, shape: Shape, trained: Trained, network: Network, distillation: ILSD, settings: Settings, batch_size: int
    ) -> None:
        self.trained, self.network, self.distillation = trained, network.train(), distillation
        self.objective, self.num_classes = shape.objective(), shape.num_classes
        device, autocast = settings.device, Precision.named(settings.precision).autocast
        self.device_type, self.autocast = device.type, autocast
        index = torch.arange(batch_size, device=device)
        self.seeds, self.labels = sample_seeds(0, index), index % shape.num_classes
        size = (batch_size, *network.sample_shape)
        masked = shape.family == "masked"
        self.x = torch.randint(shape.num_codes, size, device=device) if masked else torch.randn(size, device=device)
        self.number = 0

    def __call__(self) -> None:
        """Take the next step."""
        step, optimizer = self.number, self.trained.optimizer
        self.number += 1
        with self._precision():
            labels = drop_labels(self.labels, self.seeds, step, 0.1, self.num_classes)
            corrupted = self.objective.corrupt(self.x, self.seeds, step)
            exits = self.distillation.student_exits(0, step)
            condition = Condition(labels, corrupted.time)
            predictions, _ = self.network(corrupted.inputs, condition, self.distillation.max_loops, exits)
            loss, _ = self.distillation.loss(predictions, corrupted, self.objective, progress=0.5)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.trained.network.parameters(), 1.0)
        optimizer.step()

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device_type, self.autocast)

    def peak_bytes(self, device: torch.device) -> int:
        """Measure the peak of two steps: in the second's forward pass the gradients of the first are still there."""
        self.trained.optimizer.zero_grad()

        def two_steps() -> None:
            self()
            self()

        return self.trained.resident_bytes() + peak_above_start(two_steps, device)


def measure(name: str, shape: Shape, settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure one shape: a row for every loop count, batch size and contender; contenders of both take turns."""
    dtype = Precision.named(settings.precision).weights
    looped = Trained(shape.build(settings.num_layers, dtype, settings.device))
    for loops in settings.loops:
        unlooped = Trained(shape.build(settings.num_layers * loops, dtype, settings.device))
        for batch_size in settings.batch_sizes:
            yield from _measure_batch(name, shape, settings, looped, unlooped, loops, batch_size)


def _measure_batch(
    name: str, shape: Shape, settings: Settings, looped: Trained, unlooped: Trained, loops: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    torch.compiler.reset()
    steps: dict[Contender, Step] = {}
    for contender in _contenders(settings, loops):
        trained = unlooped if contender.way == "unlooped" else looped
        distillation = ILSD(
            1 if contender.way == "unlooped" else loops, mode="ilsd" if contender.way == "ilsd" else "vanilla"
        )
        network = trained.network
        if contender.compile != "no" or contender.checkpoint_loops:
            network = twin(network)
            network.backbone.checkpoint_loops = contender.checkpoint_loops
        if contender.compile != "no":
            network.backbone.compile_loop(contender.compile, dynamic=False)  # type: ignore[arg-type]
        steps[contender] = Step(shape, trained, network, distillation, settings, batch_size)
    precision = Precision.named(settings.precision)
    work: dict[Any, Work] = {**steps, **matmuls(settings.device, precision.autocast or precision.weights)}
    times = SideBySide(settings.device, settings.rounds, settings.turn_seconds).time(work)
    peak = peak_flops({side: measured for side, measured in times.items() if isinstance(side, int)})
    for contender, step in steps.items():
        seconds = times[contender].median
        macs = step.network.macs(step.distillation.max_loops)
        yield {
            "shape": name,
            "family": shape.family,
            "width": step.network.width,
            "num_layers": settings.num_layers,
            "loops": loops,
            **contender._asdict(),
            "batch_size": batch_size,
            "precision": settings.precision,
            "parameters": sum(weight.numel() for weight in step.network.parameters()),
            "step_seconds": times[contender].seconds,
            "first_step_seconds": times[contender].first,
            "images_per_second": batch_size / seconds,
            "share_of_peak": (1 + BACKWARD) * FLOPS_PER_MAC * macs * batch_size / seconds / peak,
            "matmul_peak": peak,
            "resident_bytes": step.trained.resident_bytes() + num_bytes(step.network),  # gradients too
            "peak_memory_bytes": step.peak_bytes(settings.device),
        }


def _contenders(settings: Settings, loops: int) -> Iterator[Contender]:
    for compile_mode in settings.compile:
        for checkpoint_loops in settings.checkpoint_loops:
            if loops > 1:
                yield Contender("ilsd", compile_mode, checkpoint_loops)
            yield Contender("vanilla", compile_mode, checkpoint_loops)
            if not checkpoint_loops:
                yield Contender("unlooped", compile_mode, checkpoint_loops)

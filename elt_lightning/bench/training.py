"""A training step with ILSD, without and with recall, of vanilla looping, and unlooped: time and memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from elt_lightning.bench import timing
from elt_lightning.bench.data_need import flops_per_training_image
from elt_lightning.bench.memory import peak_above_start
from elt_lightning.bench.shapes import Compiled, Network, Shape, num_bytes, num_parameters, twin
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.training.optimiser import parameter_groups, prefer_fused


class Contender(NamedTuple):
    """One of those that take turns."""

    way: Literal["ilsd", "recall", "vanilla", "unlooped"]  # how the step is made; "recall" is ILSD with recall
    compile: Compiled  # mode of `torch.compile`, "no" without it
    activation_checkpointing: bool  # whether each loop is computed again in the backward pass


@dataclass(frozen=True)
class Settings(timing.Settings):
    """What is measured."""

    num_layers: int  # N
    # without, with, or both; the unlooped model has one loop, where it saves nothing, and goes without
    activation_checkpointing: Sequence[bool]
    recall: bool = False  # whether ILSD with recall takes turns too


class Trained:
    """A network with its optimiser."""

    def __init__(self, network: Network) -> None:
        self.network = network.train()
        self.optimizer: Optimizer = prefer_fused(torch.optim.AdamW(parameter_groups(network), lr=1e-6))

    def resident_bytes(self) -> int:
        """Return the bytes of weights and the optimiser's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return num_bytes(self.network) + sum(value.nbytes for value in states)


class Step:
    """A training step, in the order of work that Lightning has.

    That order is forward, forget the gradients of the step before, backward, clip, step: during the forward pass
    weights, gradients and the optimiser's state are all there. ``network`` is the one trained, or a compiled or
    checkpointed twin of it.
    """

    def __init__(
        self, shape: Shape, trained: Trained, network: Network, distillation: ILSD, settings: Settings, batch_size: int
    ) -> None:
        self.trained, self.network, self.settings = trained, network, settings
        self.module = shape.module(network, distillation).train()
        self.batch, self.number = shape.batch(batch_size, settings.device), 0

    def __call__(self) -> None:
        """Take the next step."""
        with self.settings.types.context(self.settings.device.type):
            loss, _ = self.module.loss(self.batch, self.number, progress=0.5)
        self.number += 1
        self.trained.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.trained.network.parameters(), 1.0)
        self.trained.optimizer.step()

    def peak_bytes(self) -> int:
        """Measure the peak of two steps: in the second's forward pass the gradients of the first are still there."""
        self.trained.optimizer.zero_grad()

        def two_steps() -> None:
            self()
            self()

        return self.trained.resident_bytes() + peak_above_start(two_steps, self.settings.device)


def measure(name: str, shape: Shape, settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure one shape: a row for every loop count, batch size and contender; contenders of both take turns."""

    def trained(num_layers: int, recall: bool = False) -> Trained:
        return Trained(shape.build(num_layers, settings.types.weights, settings.device, recall))

    looped = trained(settings.num_layers)
    models = {"ilsd": looped, "vanilla": looped}
    if settings.recall:
        models["recall"] = trained(settings.num_layers, recall=True)
    for loops in settings.loops:
        models["unlooped"] = trained(settings.num_layers * loops)
        for batch_size in settings.batch_sizes:
            yield from _measure_batch(name, shape, settings, models, loops, batch_size)


def _measure_batch(
    name: str, shape: Shape, settings: Settings, models: dict[str, Trained], loops: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    torch.compiler.reset()
    steps: dict[Contender, Step] = {}
    for contender in _contenders(settings, loops):
        trained = models[contender.way]
        distillation = ILSD(
            1 if contender.way == "unlooped" else loops,
            mode="ilsd" if contender.way in ("ilsd", "recall") else "vanilla",
        )
        network = twin(trained.network, contender.compile)
        network.backbone.activation_checkpointing = contender.activation_checkpointing
        steps[contender] = Step(shape, trained, network, distillation, settings, batch_size)
    times, peak = settings.time(steps)
    for contender, step in steps.items():
        seconds = times[contender].median
        flops = flops_per_training_image(step.network.macs(step.module.max_loops))
        yield {
            "shape": name,
            "family": shape.family,
            "width": step.network.width,
            "num_layers": settings.num_layers,
            "loops": loops,
            **contender._asdict(),
            "batch_size": batch_size,
            "precision": settings.precision,
            "parameters": num_parameters(step.network),
            "step_seconds": times[contender].seconds,
            "first_step_seconds": times[contender].first,
            "images_per_second": batch_size / seconds,
            "share_of_peak": flops * batch_size / seconds / peak,
            "matmul_peak": peak,
            "resident_bytes": step.trained.resident_bytes() + num_bytes(step.network),  # gradients too
            "peak_memory_bytes": step.peak_bytes(),
        }


def _contenders(settings: Settings, loops: int) -> Iterator[Contender]:
    for compile_mode in settings.compile:
        for activation_checkpointing in settings.activation_checkpointing:
            if loops > 1:
                yield Contender("ilsd", compile_mode, activation_checkpointing)
                if settings.recall:
                    yield Contender("recall", compile_mode, activation_checkpointing)
            yield Contender("vanilla", compile_mode, activation_checkpointing)
            if not activation_checkpointing:
                yield Contender("unlooped", compile_mode, activation_checkpointing)

"""The looped model against the unlooped one of the same effective depth: samples per second, side by side."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from elt_lightning.bench import timing
from elt_lightning.bench.memory import peak_above_start
from elt_lightning.bench.shapes import Compiled, Network, Shape, num_bytes, num_parameters, twin
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds

Model = Literal["looped", "unlooped"]


class Contender(NamedTuple):
    """One of those that take turns."""

    model: Model  # the shared layers looped, or as many layers as they pass through, once
    loops: int  # L of the looped model
    compile: Compiled  # mode of `torch.compile`, "no" without it
    what: Literal["sample", "pass"]  # a whole sample, or one pass of the network


@dataclass(frozen=True)
class Settings(timing.Settings):
    """What is measured."""

    steps: int  # sampling steps
    guidance: float  # scale; other than 1 it costs a second branch


def measure(name: str, shape: Shape, settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure one shape: a row for every batch size, loop count, compilation and model, the batch sizes one by one.

    All contenders of a batch size take turns, and products of matrices with them.
    """

    def build(num_layers: int) -> Network:
        return shape.build(num_layers, settings.types.weights, settings.device).eval()

    looped = build(shape.num_layers)
    networks: dict[tuple[Model, int], Network] = {}
    for loops in settings.loops:
        networks["looped", loops] = looped
        networks["unlooped", loops] = build(shape.num_layers * loops)
    for batch_size in settings.batch_sizes:
        yield from _measure_batch(name, shape, settings, networks, batch_size)


def _measure_batch(
    name: str, shape: Shape, settings: Settings, networks: dict[tuple[Model, int], Network], batch_size: int
) -> Iterator[dict[str, Any]]:
    torch.compiler.reset()
    work: dict[Contender, timing.Work] = {}
    compiled: dict[tuple[int, str], Network] = {}  # a network is compiled once, whatever its loops
    for (model, loops), network in networks.items():
        for mode in settings.compile:
            if (id(network), mode) not in compiled:
                compiled[id(network), mode] = twin(network, mode)
            calls = Calls(shape, compiled[id(network), mode], settings, batch_size, loops if model == "looped" else 1)
            work[Contender(model, loops, mode, "sample")] = calls.sample
            work[Contender(model, loops, mode, "pass")] = calls.one_pass
    times, peak = settings.time(work)
    for contender in work:
        if contender.what != "sample":
            continue
        network = networks[contender.model, contender.loops]
        sample, one_pass = times[contender], times[contender._replace(what="pass")]
        macs = network.macs(contender.loops if contender.model == "looped" else 1)
        yield {
            "shape": name,
            "family": shape.family,
            "width": network.width,
            "num_layers": shape.num_layers,
            "model": contender.model,
            "loops": contender.loops,
            "compile": contender.compile,
            "batch_size": batch_size,
            "precision": settings.precision,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "parameters": num_parameters(network),
            "sample_seconds": sample.seconds,
            "pass_seconds": one_pass.seconds,
            "first_call_seconds": sample.first,
            "samples_per_second": batch_size / sample.median,
            "pass_share_of_peak": 2 * macs * batch_size / one_pass.median / peak,
            "matmul_peak": peak,
            "peak_memory_bytes": num_bytes(network) + peak_above_start(work[contender], settings.device),
        }


class Calls:
    """What is timed of one network: drawing samples, and one pass."""

    def __init__(self, shape: Shape, network: Network, settings: Settings, batch_size: int, loops: int) -> None:
        self.loops, self.settings = loops, settings
        self.module = shape.module(network, ILSD(1), settings.steps, settings.guidance).eval()
        self.batch = shape.batch(batch_size, settings.device)
        self.seeds = sample_seeds(0, self.batch.indices)
        self.condition = Condition(self.batch.labels, torch.full((batch_size,), 0.5, device=settings.device))

    def sample(self) -> object:
        """Draw a batch."""
        with self.settings.types.context(self.settings.device.type):
            return self.module.sample(self.batch.labels, self.loops, self.seeds)

    @torch.no_grad()
    def one_pass(self) -> object:
        """Call the network once."""
        with self.settings.types.context(self.settings.device.type):
            return self.module.network(self.batch.x, self.condition, self.loops)

"""The looped model against the unlooped one of the same effective depth: samples per second, side by side."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from elt_lightning.bench.memory import peak_above_start
from elt_lightning.bench.shapes import Network, Shape, num_bytes, twin
from elt_lightning.bench.timing import SideBySide, Work, matmuls, peak_flops
from elt_lightning.networks.base import Pass
from elt_lightning.planning import FLOPS_PER_MAC, Precision
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds

Model = Literal["looped", "unlooped"]


class Contender(NamedTuple):
    """One of those that take turns.

    Attributes:
        model: the shared layers looped, or as many layers as they pass through, once.
        loops: L of the looped model.
        compile: mode of `torch.compile`, "no" without it.
        what: a whole sample, or one pass of the network.
    """

    model: Model
    loops: int
    compile: str
    what: Literal["sample", "pass"]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        loops: loop counts.
        batch_sizes: samples drawn at once.
        compile: "no", and modes of `torch.compile`.
        precision: Lightning's name of it.
        steps: sampling steps.
        guidance: scale; other than 1 it costs a second branch.
        rounds: turns of every contender.
        turn_seconds: that a turn takes at least.
        device: where.
    """

    loops: Sequence[int]
    batch_sizes: Sequence[int]
    compile: Sequence[str]
    precision: str
    steps: int
    guidance: float
    rounds: int
    turn_seconds: float
    device: torch.device

    def context(self) -> AbstractContextManager[Any]:
        """Compute in the precision."""
        autocast = Precision.named(self.precision).autocast
        return nullcontext() if autocast is None else torch.autocast(self.device.type, autocast)

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Type that products of matrices are computed in."""
        precision = Precision.named(self.precision)
        return precision.autocast or precision.weights


def measure(name: str, shape: Shape, settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure one shape: a row for every batch size, loop count, compilation and model, the batch sizes one by one.

    All contenders of a batch size take turns, and products of matrices with them.
    """
    dtype = Precision.named(settings.precision).weights
    looped = shape.build(shape.num_layers, dtype, settings.device).eval()
    networks: dict[tuple[Model, int], Network] = {}
    for loops in settings.loops:
        networks["looped", loops] = looped
        networks["unlooped", loops] = shape.build(shape.num_layers * loops, dtype, settings.device).eval()
    for batch_size in settings.batch_sizes:
        yield from _measure_batch(name, shape, settings, networks, batch_size)


@torch.no_grad()
def _measure_batch(
    name: str, shape: Shape, settings: Settings, networks: dict[tuple[Model, int], Network], batch_size: int
) -> Iterator[dict[str, Any]]:
    torch.compiler.reset()
    work: dict[Any, Work] = {}
    compiled: dict[tuple[int, str], Network] = {}  # a network is compiled once, whatever its loops
    for (model, loops), network in networks.items():
        for mode in settings.compile:
            chosen = network if mode == "no" else compiled.setdefault((id(network), mode), _compiled(network, mode))
            calls = Calls(shape, chosen, settings, batch_size, loops if model == "looped" else 1)
            work[Contender(model, loops, mode, "sample")] = calls.sample
            work[Contender(model, loops, mode, "pass")] = calls.one_pass
    work |= matmuls(settings.device, settings.matmul_dtype)
    times = SideBySide(settings.device, settings.rounds, settings.turn_seconds).time(work)
    peak = peak_flops({side: measured for side, measured in times.items() if isinstance(side, int)})
    for contender in work:
        if isinstance(contender, int) or contender.what != "sample":
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
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "sample_seconds": sample.seconds,
            "pass_seconds": one_pass.seconds,
            "first_call_seconds": sample.first,
            "samples_per_second": batch_size / sample.median,
            "pass_share_of_peak": FLOPS_PER_MAC * macs * batch_size / one_pass.median / peak,
            "matmul_peak": peak,
            "peak_memory_bytes": num_bytes(network) + peak_above_start(work[contender], settings.device),
        }


def _compiled(network: Network, mode: str) -> Network:
    other = twin(network)
    other.backbone.compile_loop(mode, dynamic=False)  # type: ignore[arg-type]
    return other


class Calls:
    """What is timed of one network: drawing samples, and one pass."""

    def __init__(self, shape: Shape, network: Network, settings: Settings, batch_size: int, loops: int) -> None:
        self.network, self.loops, self.settings = network, loops, settings
        device = settings.device
        self.objective, self.sampler = shape.objective(), shape.sampler(settings.steps, settings.guidance)
        index = torch.arange(batch_size, device=device)
        self.seeds, labels = sample_seeds(0, index), index % shape.num_classes
        if shape.family == "masked":
            self.x = torch.full((batch_size, *network.sample_shape), shape.num_codes, device=device)
            self.condition = Condition(labels)
        else:
            self.x = torch.randn(batch_size, *network.sample_shape, device=device)
            self.condition = Condition(labels, torch.full((batch_size,), 0.5, device=device))

    def _predict(
        self, x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> Pass:
        predictions, state = self.network(x, condition, loops, exits, state)
        return Pass({r: self.objective.denoised(p, x, condition) for r, p in predictions.items()}, state)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw a batch."""
        labels = Condition(self.condition.labels)
        with self.settings.context():
            return self.sampler.sample(self._predict, self.network.sample_shape, labels, self.loops, self.seeds)

    @torch.no_grad()
    def one_pass(self) -> Tensor:
        """Call the network once."""
        with self.settings.context():
            return self.network(self.x, self.condition, self.loops).predictions[self.loops]

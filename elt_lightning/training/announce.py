"""What long work will take, printed before it begins."""

import sys
import time
from contextlib import suppress

import torch
from torch import Tensor

from elt_lightning.model import ELTModel
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.training.meter import duration, is_first_process

LONG = 10**12
"""Multiply–accumulates that take a CPU minutes: announced beforehand."""

TIMED_LOOPS, TIMED_SAMPLES = 4, 64
"""The most that the pass has which is timed."""


class _Timed(Exception):  # noqa: N818  # it ends a sampling after its first call of the network
    pass


def announce(what: str, macs: int, module: ELTModel, sampler: Sampler, samples: int) -> None:
    """Print the floating-point operations that long work takes, and the time, by a short pass of the network.

    Every process has to call this: the weights of a pass may be sharded.

    Args:
        what: begins the line.
        macs: multiply–accumulates of all the work on one device; fewer than :data:`LONG` are not announced.
        module: on the device that works.
        sampler: begins a sampling for the pass.
        samples: that are drawn at once.
    """
    if macs <= LONG:
        return
    seconds = macs / macs_per_second(module, sampler, samples)
    if is_first_process():
        where = f"this {module.device.type.upper().replace('CUDA', 'GPU')}"
        line = f"{what}: {2 * macs:.2g} floating-point operations a device, about {duration(seconds)} on {where}"
        print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def macs_per_second(module: ELTModel, sampler: Sampler, samples: int) -> float:
    """Time the network's first call of a sampling, at a few loops; the second time, when everything is loaded."""
    sampler = sampler.with_settings(loop_schedule="constant")  # another one may end below the weak exit at so few loops
    samples, loops = min(samples, TIMED_SAMPLES), TIMED_LOOPS + (sampler.guidance.weak_loops or 0)
    labels = torch.zeros(samples, dtype=torch.int64, device=module.device)
    seeds = sample_seeds(0, torch.arange(samples, device=module.device))
    taken = done = 0.0

    def first_call(x: Tensor, condition: Condition, loops: int, exits: object = (), state: object = None) -> None:
        nonlocal taken, done
        began = now(module.device)
        module.predict(x, condition, loops)
        taken, done = now(module.device) - began, len(x) * module.network.macs(loops)
        raise _Timed

    for _ in range(2):
        with suppress(_Timed):
            sampler.sample(first_call, module.network.sample_shape, Condition(labels), loops, seeds)  # type: ignore[arg-type]
    return done / taken


def now(device: torch.device) -> float:
    """Return the time in seconds at which a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

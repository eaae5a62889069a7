"""Memory: the peak of what tensors take, measured; and what a looped model saves, by arithmetic."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from elt_lightning.module import ELTModule
from elt_lightning.planning import Precision, Rehearsal, optimizer_bytes_per_byte


def peak_above_start(work: Callable[[], object], device: torch.device) -> int:
    """Measure how many bytes more than at its start tensors take at the peak of ``work``.

    On CUDA that is what ``torch.cuda.max_memory_allocated`` says; on a CPU the running sum of every allocation and
    release of torch's allocator, as the profiler records them. Neither sees what libraries allocate for themselves, and
    the second not when something from before ``work`` is released in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=_time)
    live = top = 0
    for _, change in changes:
        live += change
        top = max(top, live)
    return top


def _time(change: tuple[int, int]) -> int:
    return change[0]


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Leave out what the profiler's library writes there when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the end of a training step's forward pass.

    Copies of weights in autocast's type are counted, averaged weights and the buffers of several devices are not.

    Attributes:
        resident: what is there whatever the batch: weights, gradients and casts, the optimiser's state.
        per_sample: what is kept of each sample for the backward pass.
    """

    resident: int
    per_sample: int

    @classmethod
    def of(cls, module: ELTModule, precision: Precision) -> "TrainingMemory":
        """Count the bytes of a model, best on the ``meta`` device, in a precision."""
        weights = sum(weight.numel() for weight in module.network.parameters()) * precision.weights.itemsize
        state = round(weights * optimizer_bytes_per_byte(module, precision.weights))
        kept = Rehearsal(module, precision).step()
        return cls(2 * weights + state + kept.fixed, kept.per_sample)

    def at(self, batch_size: int) -> int:
        """Bytes of a pass of that many samples."""
        return self.resident + batch_size * self.per_sample


def batch_of_saving(looped: TrainingMemory, unlooped: TrainingMemory, share: float) -> float:
    """Find the batch at which the looped model takes ``share`` less memory than the unlooped one; smaller save more.

    Both grow with the batch nearly alike, and what is saved is what the missing parameters take. A negative number says
    that so much is never saved.
    """
    # (1 − share)·(unlooped + batch·its activations) = looped + batch·its activations
    resident = (1 - share) * unlooped.resident - looped.resident
    return resident / (looped.per_sample - (1 - share) * unlooped.per_sample)

"""Memory: the peak of what tensors take."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from operator import itemgetter

import torch
from torch.profiler import ProfilerActivity, profile


def peak_above_start(work: Callable[[], object], device: torch.device) -> int:
    """Measure how many more bytes tensors take at the peak of ``work`` than at its start.

    On CUDA that is ``torch.cuda.max_memory_allocated``; on a CPU the running sum of every allocation and
    release of torch's allocator, as the profiler records them. Neither sees what libraries allocate for themselves, and
    the second misses what ``work`` releases from before it.
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
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate((change for _, change in sorted(changes, key=itemgetter(0))), initial=0))


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

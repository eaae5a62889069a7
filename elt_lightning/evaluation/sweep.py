"""The sweep over loop counts: the same labels and seeds at every loop count, scored, timed, and kept as pictures."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from elt_lightning.data.base import HeldOutOrder, Request
from elt_lightning.evaluation.archives import SampleArchive, picture_array
from elt_lightning.evaluation.known import known_pixels
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.training.module import ELTModule


@dataclass
class Row:
    """What was measured at one loop count and one setting of the sampler."""

    loops: int  # loop count
    guidance: float  # guidance scale
    carry_state: bool = False  # whether each sampling step began from the loop's state of the step before
    metrics: dict[str, list[float]] = field(default_factory=dict)  # {name: one value per repeat}
    samples_per_second: float = 0.0  # drawing alone, over all devices, without decoding and scoring
    # (n, C, H, W), or clips (n, C, F, H, W), uint8, the first samples; the same labels and seeds in every row
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))
    # (n,) bool, which of the pictures are right; empty where no metric can say
    correct: Tensor = field(default_factory=lambda: torch.empty(0))
    # like ``pictures``, what was given of each, the rest grey; empty where nothing was
    given: Tensor = field(default_factory=lambda: torch.empty(0))

    def mean(self, name: str) -> float:
        """Return the mean of a metric over repeats."""
        return mean(self.metrics[name])

    def std(self, name: str) -> float | None:
        """Return the sample standard deviation over repeats, None for a single one."""
        values = self.metrics[name]
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """How a sweep is run."""

    num_samples: int  # samples per repeat
    batch_size: int  # samples drawn at once on one device; it changes speed and memory, not results
    seed: int  # of the first repeat; repeat r uses seed + r
    repeats: int = 1  # independent repeats of every measurement
    num_pictures: int = 10  # samples kept as pictures
    rank: int = 0  # this process
    world_size: int = 1  # processes that share the samples

    def run(
        self,
        module: ELTModule,
        sampler: Sampler,
        tokenizer: Tokenizer,
        metrics: Sequence[SampleMetric],
        loops: int,
        request: Callable[[Tensor], Request],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[int], None] = lambda count: None,
        archive: SampleArchive | None = None,
    ) -> Row:
        """Measure one loop count.

        Args:
            module: in eval mode, on its device.
            sampler: with the guidance to measure, and its state carried or not.
            tokenizer: turns codes into pixels, on the module's device.
            metrics: reset and filled here, on the module's device.
            loops: loop count.
            request: of the data module: the labels of the samples with these numbers (B,), and what is given of them.
            context: the precision to run in.
            progress: called with the number of samples drawn since the last call, over all ranks; equally often on
                every rank, so that it may communicate.
            archive: takes the pictures of the first repeat.
        """
        row = Row(loops, sampler.guidance.scale, bool(sampler.carry_state))
        seconds = 0.0
        most = len(HeldOutOrder(self.num_samples, self.batch_size, 0, self.world_size))  # batches of the first rank
        for repeat in range(self.repeats):
            for metric in metrics:
                metric.reset()
            share = HeldOutOrder(self.num_samples, self.batch_size, self.rank, self.world_size)
            for index in (numbers.to(module.device) for numbers in share):
                labels, _, known, _ = request(index)
                began = _now(module.device)
                with context():
                    codes = module.sample(labels, loops, sample_seeds(self.seed + repeat, index), known, sampler)
                seconds += _now(module.device) - began
                pixels = tokenizer.decode(codes)
                for metric in metrics:
                    metric.update(pixels.to(metric.device), labels.to(metric.device))
                missing = self.num_pictures - len(row.pictures)
                if repeat == 0 and missing > 0:
                    keep_pictures(row, pixels[:missing], labels[:missing], tokenizer, metrics)
                    if known is not None:
                        shown = known_pixels(known[:missing], module.grid, module.codebook_size, tokenizer)
                        row.given = joined(row.given, tokenizer.present(shown).cpu())
                if archive is not None and repeat == 0:
                    archive.add(picture_array(pixels), labels.cpu().numpy())
                progress(len(labels) * self.world_size)
            for _ in range(len(share), most):
                progress(0)
            for metric in metrics:
                for name, value in metric.compute().items():
                    row.metrics.setdefault(name, []).append(float(value))
        row.samples_per_second = self.num_samples * self.repeats / seconds if seconds else 0.0
        return row


def keep_pictures(
    row: Row, pixels: Tensor, labels: Tensor, tokenizer: Tokenizer, metrics: Sequence[SampleMetric]
) -> None:
    """Add pixels (n, C, H, W) to the pictures of a row, and whether a metric finds each right."""
    row.pictures = joined(row.pictures, tokenizer.present(pixels).cpu())
    for metric in metrics:
        correct = metric.correct(pixels.to(metric.device), labels.to(metric.device))
        if correct is not None:
            row.correct = joined(row.correct, correct.cpu())


def joined(so_far: Tensor, more: Tensor) -> Tensor:
    """Add samples to those kept so far, of which there may be none."""
    return torch.cat([so_far, more]) if len(so_far) else more


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""The sweep over settings: the same labels and seeds at each, scored, timed, and kept as pictures."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from elt_lightning.data.base import HeldOutOrder, Request
from elt_lightning.errors import UserError
from elt_lightning.evaluation.archives import SampleArchive, picture_array
from elt_lightning.evaluation.known import known_pixels
from elt_lightning.evaluation.spent import SpentLoops, Spread
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.model import ELTModel
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.training.announce import now


@dataclass
class Row:
    """What was measured at one loop count and one setting of the sampler."""

    loops: int  # loop count; with a tolerance, the most that were allowed
    settings: dict[str, Any] = field(default_factory=dict)  # of the sampler, as `Sampler.settings` names them
    metrics: dict[str, list[float]] = field(default_factory=dict)  # {name: one value per repeat}
    macs_per_sample: int = 0  # multiply–accumulates of drawing one sample
    mean_loops: float = 0.0  # over samples and sampling steps, as they were run
    loops_spread: Spread | None = None  # of each sample's mean, where a tolerance ends loops
    loops_per_step: Spread | None = None  # of each sampling step
    loops_map: Tensor = field(default_factory=lambda: torch.empty(0))  # (n, K), of the first batch of samples
    samples_per_second: float = 0.0  # drawing alone, over all devices, without decoding and scoring
    # (n, C, H, W), or clips (n, C, F, H, W), uint8, the first samples; the same labels and seeds in every row
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))  # (n,) their classes
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
    first: int = 0  # number of the first sample; others meet other noise, and of puzzles other ones

    def run(
        self,
        module: ELTModel,
        sampler: Sampler,
        tokenizer: Tokenizer,
        metrics: Sequence[SampleMetric],
        loops: int,
        request: Callable[[Tensor], Request],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[int], None] = lambda count: None,
        archive: SampleArchive | None = None,
    ) -> Row:
        """Measure one setting.

        Args:
            module: in eval mode, on its device.
            sampler: with the settings to measure.
            tokenizer: turns codes into pixels, on the module's device.
            metrics: reset and filled here, on the module's device.
            loops: loop count; with a tolerance, the most.
            request: of the data module: the labels of the samples with these numbers (B,), and what is given of them.
            context: the precision to run in.
            progress: called with the number of samples drawn since the last call, over all ranks; equally often on
                every rank, so that it may communicate.
            archive: takes the pictures of the first repeat.

        Raises:
            UserError: two metrics have a score of the same name.
        """
        per_step, seconds = sampler.loops_per_step(loops), 0.0
        row = Row(loops, sampler.settings(), macs_per_sample=module.macs_per_sample(loops, sampler))
        counted = SpentLoops(per_step).to(module.device)
        most = len(HeldOutOrder(self.num_samples, self.batch_size, 0, self.world_size))  # batches of the first rank
        for repeat in range(self.repeats):
            for metric in metrics:
                metric.reset()
            share = HeldOutOrder(self.num_samples, self.batch_size, self.rank, self.world_size)
            for index in (torch.tensor(numbers, device=module.device) + self.first for numbers in share):
                labels, _, known, _ = request(index)
                seeds, spent = sample_seeds(self.seed + repeat, index), list[Tensor]()
                began = now(module.device)
                with context():
                    codes = module.sample(labels, loops, seeds, known, sampler, spent)
                seconds += now(module.device) - began
                if sampler.loop_schedule.tolerance is not None:
                    counted.update(torch.stack(spent, 1))
                    row.loops_map = row.loops_map if len(row.loops_map) else torch.stack(spent, 1).cpu()
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
                    values = row.metrics.setdefault(name, [])
                    if len(values) > repeat:
                        raise UserError(f"two metrics call their score {name}: give one of them another name")
                    values.append(float(value))
        row.mean_loops = mean(per_step)
        if sampler.loop_schedule.tolerance is not None:
            row.loops_per_step, row.loops_spread = counted.compute()
            row.mean_loops = row.loops_spread.mean[0]
            branches = [sampler.guidance.branches(step, sampler.steps) for step in range(sampler.steps)]
            passes = sum(map(operator.mul, branches, row.loops_per_step.mean))
            # Each is a pass of one loop, and all cost the same.
            row.macs_per_sample = round(row.macs_per_sample * passes / sum(map(operator.mul, branches, per_step)))
        row.samples_per_second = self.num_samples * self.repeats / seconds if seconds else 0.0
        return row


def swept_settings(
    loops: Sequence[int], sampler: Sampler, swept: Mapping[str, Sequence[Any] | None], has_recall: bool
) -> tuple[list[tuple[int, Sampler]], list[str]]:
    """List what a sweep measures: every loop count with every combination of settings, each once.

    Args:
        loops: loop counts.
        sampler: whose settings are changed.
        swept: {setting: values}, names as :meth:`Sampler.settings` has them; None for the sampler's own.
        has_recall: of the network.

    Returns:
        loop counts and samplers; and a line about each combination that is left out, since its loops end before the
        weak exit of its guidance, or at it.

    Raises:
        ValueError: a value that its setting may not have, or nothing is left.
    """
    names = [name for name, values in swept.items() if values is not None]
    samplers = [
        sampler.with_settings(**dict(zip(names, values, strict=True))).suited_to(has_recall)
        for values in product(*(swept[name] or () for name in names))
    ]
    found: dict[tuple[Any, ...], tuple[int, Sampler]] = {}
    left_out: dict[str, None] = {}
    for count in loops:
        for each in samplers:
            try:
                each.loops_per_step(count)
            except ValueError as error:
                left_out[f"loops {count} with weak_loops {each.guidance.weak_loops} is left out: {error}"] = None
            else:
                found.setdefault((count, *each.settings().values()), (count, each))
    if not found:
        raise ValueError(f"no setting is left to measure: {next(iter(left_out), 'no values are given')}")
    return list(found.values()), list(left_out)


def keep_pictures(
    row: Row, pixels: Tensor, labels: Tensor, tokenizer: Tokenizer, metrics: Sequence[SampleMetric]
) -> None:
    """Add pixels (n, C, H, W) to the pictures of a row, and whether the first metric that can tell finds each right."""
    row.pictures = joined(row.pictures, tokenizer.present(pixels).cpu())
    row.labels = joined(row.labels, labels.cpu())
    told = (metric.correct(pixels.to(metric.device), labels.to(metric.device)) for metric in metrics)
    if (correct := next((each for each in told if each is not None), None)) is not None:
        row.correct = joined(row.correct, correct.cpu())


def joined(so_far: Tensor, more: Tensor) -> Tensor:
    """Add samples to those kept so far, of which there may be none."""
    return torch.cat([so_far, more]) if len(so_far) else more

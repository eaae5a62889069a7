"""How fast what is trained on and encoded is read, beside how fast one GPU would take it in.

What is read is made for it in a temporary folder, by :mod:`~elt_lightning.bench.data_files`.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lightning import Trainer

from elt_lightning.bench.data_files import random_shards, write_pictures, write_videos
from elt_lightning.bench.data_need import diffusion_need, masked_need, tokenizer_need, video_need
from elt_lightning.data.base import BatchedDataModule
from elt_lightning.data.crops import Picture, Request, chunks, crop_all
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.data.images import open_source
from elt_lightning.data.published import imagenet_moments, imagenet_tokens, ucf101_tokens
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.ucf101 import UCF101DataModule
from elt_lightning.data.video_tokens import UCF101TokensDataModule

IMAGENET, UCF101, CLIPS_PER_VIDEO = 1_281_167, 9_537, 4
"""Training pictures of ImageNet, training videos of UCF-101's first split, and the clips that docs/ucf101.md has of
each."""

Epoch = Callable[[], Iterable[Sized]]
"""Begins an epoch; yields for each batch something as long as the batch."""


@dataclass(frozen=True)
class Reading:
    """One measurement."""

    codes: str  # what is read
    unit: Literal["images", "clips"]  # what a sample of it is
    num_workers: int  # loader processes
    batch_size: int  # samples per batch
    per_second: tuple[float, ...]  # samples, of each repeat
    # samples that one GPU takes in, at `FLOPS_PER_SECOND`; None where no training waits
    needed_per_second: float | None
    published: int  # samples of the published set

    @property
    def ratio(self) -> float | None:
        """How many such GPUs this machine can feed."""
        return None if self.needed_per_second is None else median(self.per_second) / self.needed_per_second

    @property
    def hours(self) -> float:
        """Hours that the published set would take to be read once."""
        return self.published / median(self.per_second) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data; speeds are named after the unit."""
        content = asdict(self)
        speeds = {f"{self.unit}_per_second": content.pop("per_second")}
        middle = median(self.per_second)
        derived = {"median": middle, "batches_per_second": middle / self.batch_size, "ratio": self.ratio}
        return content | speeds | derived | {"hours": self.hours}


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    # {what is counted: how many there are in an epoch}, by `Subject.counted`; 0 leaves out what is made of them
    num_samples: dict[str, int]
    num_workers: int  # loader processes
    batch_size: int | None  # samples per batch; None for each subject's own
    repeats: int  # epochs that are timed


@dataclass(frozen=True)
class Subject:
    """Something whose reading is measured."""

    codes: str  # what it is
    unit: Literal["images", "clips"]  # what a sample of it is
    counted: str  # what the command line counts of it: "images", "videos" or "jpegs"
    batch_size: int  # samples of an optimiser step in its config, or of a batch of `elt encode`
    at_once: int  # of these, how many a loader process reads together: those of a forward pass on one device
    published: int  # samples of the published set
    # returns the samples per second that one GPU takes in, None where no training waits
    needed: Callable[[], float | None]
    # makes the samples; arguments are their number, loader processes, ``batch_size`` and ``at_once``
    made: Callable[[int, int, int, int], AbstractContextManager[Epoch]]

    def measure(self, settings: Settings) -> Reading:
        """Time epochs.

        One is read first, so that as many files as fit are in memory: this measures the program, not the disk.
        """
        batch_size = settings.batch_size or self.batch_size
        at_once = math.gcd(batch_size, self.at_once)
        with self.made(settings.num_samples[self.counted], settings.num_workers, batch_size, at_once) as epoch:
            speeds = [samples_per_second(epoch) for _ in range(1 + settings.repeats)][1:]
        return Reading(
            self.codes, self.unit, settings.num_workers, batch_size, tuple(speeds), self.needed(), self.published
        )


def measure(settings: Settings) -> Iterator[Reading]:
    """Measure how fast everything that is not left out is read."""
    return (subject.measure(settings) for subject in SUBJECTS if settings.num_samples[subject.counted])


def samples_per_second(epoch: Epoch) -> float:
    """Time one epoch, the start of the loader processes with it."""
    began = time.perf_counter()
    count = sum(map(len, epoch()))
    return count / (time.perf_counter() - began)


@contextmanager
def shards(
    index_of: Callable[[int], ShardIndex],
    kind: Callable[..., BatchedDataModule],
    count: int,
    num_workers: int,
    batch_size: int,
    at_once: int,
) -> Iterator[Epoch]:
    """Make shards, and read them as the data module of a training does.

    Args:
        index_of: returns the index of a number of samples.
        kind: of the data module.
        count: samples.
        num_workers: loader processes.
        batch_size: samples of an optimiser step.
        at_once: samples of a forward pass.
    """
    with random_shards(index_of(count)) as location:
        yield training(kind(location, None, batch_size=batch_size, micro_batch_size=at_once, num_workers=num_workers))


@contextmanager
def videos(count: int, num_workers: int, batch_size: int, at_once: int) -> Iterator[Epoch]:
    """Make videos, and read clips of them as training of a tokenizer does; the arguments are those of :func:`shards`.

    A clip begins anywhere in its video, which is decoded from its first frame on: 102 of 188 frames on average.
    """
    with TemporaryDirectory() as root:
        write_videos(Path(root), count)
        yield training(
            UCF101DataModule(
                f"{root}/UCF-101",
                f"{root}/ucfTrainTestlist",
                split="all",
                batch_size=batch_size,
                micro_batch_size=at_once,
                num_workers=num_workers,
            )
        )


@contextmanager
def pictures(count: int, num_workers: int, batch_size: int, at_once: int) -> Iterator[Epoch]:
    """Make pictures, and decode and crop them as `elt encode imagenet` does, which then has them encoded.

    The arguments are those of :func:`shards`.
    """
    with TemporaryDirectory() as root:
        write_pictures(Path(root), count)
        source = open_source([root])

        def epoch() -> Iterator[Sequence[Picture]]:
            parts = range(source.num_parts)
            requests = (Request(part, chunk) for part in parts for chunk in chunks(source.part(part), at_once))
            return (crops.pictures for crops in crop_all(requests, 256, num_workers))

        yield epoch


def training(data: BatchedDataModule) -> Epoch:
    """Return a data module's training batches, as in the first epoch of a training."""
    data.trainer = _trainer()
    data.trainer.accumulate_grad_batches = data.share_batch(1)[1]
    data.setup("fit")
    return lambda: (batch.labels for batch in data.train_dataloader())


@cache
def _trainer() -> Trainer:
    """Build the trainer that data modules ask for the number of devices and the step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GPU, if there is one, is not used
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


SUBJECTS = (
    Subject(
        codes="tokens",
        unit="images",
        counted="images",
        batch_size=512,
        at_once=512,
        published=IMAGENET,
        needed=masked_need,
        made=partial(shards, imagenet_tokens, ImageNetDataModule),
    ),
    Subject(
        codes="moments of latents",
        unit="images",
        counted="images",
        batch_size=512,
        at_once=512,
        published=IMAGENET,
        needed=diffusion_need,
        made=partial(shards, imagenet_moments, ImageNetDataModule),
    ),
    Subject(
        codes="tokens of clips",
        unit="clips",
        counted="images",
        batch_size=256,
        at_once=32,
        published=UCF101 * CLIPS_PER_VIDEO,
        needed=video_need,
        made=partial(shards, ucf101_tokens, UCF101TokensDataModule),
    ),
    Subject(
        codes="clips of AVI files",
        unit="clips",
        counted="videos",
        batch_size=128,
        at_once=4,
        published=UCF101,
        needed=tokenizer_need,
        made=videos,
    ),
    Subject(
        codes="JPEG files, to be encoded",
        unit="images",
        counted="jpegs",
        batch_size=64,
        at_once=64,
        published=IMAGENET,
        needed=lambda: None,
        made=pictures,
    ),
)
"""What is measured, in this order."""

"""How fast what is trained on and encoded is read, beside how fast one GPU would take it in.

What is read is made for it in a temporary folder, by :mod:`~elt_lightning.bench.data_files`.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
class Subject:
    """Something whose reading is measured."""

    codes: str  # what it is
    unit: Literal["images", "clips"]  # what a sample of it is
    counted: str  # what the command line counts of it: "images", "videos" or "jpegs"
    batch_size: int  # samples of an optimiser step in its config, or of a batch of `elt encode`
    at_once: int  # of these, how many a loader process reads together: those of a forward pass on one device
    published: int  # samples of the published set
    needed: Callable[[], float | None]  # samples per second that one GPU takes in; None where no training waits
    # makes the samples; arguments are their number, loader processes, ``batch_size`` and ``at_once``
    made: Callable[[int, int, int, int], AbstractContextManager[Epoch]]

    def measure(self, num_samples: int, num_workers: int, batch_size: int | None, repeats: int) -> dict[str, Any]:
        """Time epochs, and return what is known as plain data; speeds are named after the unit.

        One is read first, so that as many files as fit are in memory: this measures the program, not the disk.
        The batch size is the subject's own unless another is given.
        """
        batch_size = batch_size or self.batch_size
        with self.made(num_samples, num_workers, batch_size, math.gcd(batch_size, self.at_once)) as epoch:
            speeds = [samples_per_second(epoch) for _ in range(1 + repeats)][1:]
        middle, needed = median(speeds), self.needed()
        return {
            "codes": self.codes,
            "unit": self.unit,
            "num_workers": num_workers,
            "batch_size": batch_size,
            "needed_per_second": needed,
            "published": self.published,
            f"{self.unit}_per_second": speeds,
            "median": middle,
            "batches_per_second": middle / batch_size,
            "ratio": None if needed is None else middle / needed,  # such GPUs that this machine can feed
            "hours": self.published / middle / 3600,  # that the published set takes to be read once
        }


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
    """Make shards of the index of ``count`` samples, and read them by a data module as a training does."""
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


_tokens = partial(shards, imagenet_tokens, ImageNetDataModule)
_moments = partial(shards, imagenet_moments, ImageNetDataModule)
_clip_tokens = partial(shards, ucf101_tokens, UCF101TokensDataModule)
_clips = UCF101 * CLIPS_PER_VIDEO
SUBJECTS = (
    Subject("tokens", "images", "images", 512, 512, IMAGENET, masked_need, _tokens),
    Subject("moments of latents", "images", "images", 512, 512, IMAGENET, diffusion_need, _moments),
    Subject("tokens of clips", "clips", "images", 256, 32, _clips, video_need, _clip_tokens),
    Subject("clips of AVI files", "clips", "videos", 128, 4, UCF101, tokenizer_need, videos),
    Subject("JPEG files, to be encoded", "images", "jpegs", 64, 64, IMAGENET, lambda: None, pictures),
)
"""What is measured, in this order."""

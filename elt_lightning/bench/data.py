"""How fast encoded pictures are read, beside how fast one GPU would take them in."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from elt_lightning.data.crops import Picture
from elt_lightning.data.encode import ShardFolder, shard_name
from elt_lightning.data.shards import Shard, ShardIndex
from elt_lightning.data.streams import ShardLoader, TrainingStream
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer

FLOPS_PER_SECOND = 0.5 * 989e12
"""What one H100 or H200 is taken to do in training: half of its published peak in dense bf16."""


@dataclass(frozen=True)
class Reading:
    """One measurement.

    Attributes:
        codes: what the shards hold.
        num_workers: loader processes.
        batch_size: samples per batch.
        images_per_second: of each repeat.
        needed_per_second: what one GPU takes in, at :data:`FLOPS_PER_SECOND`.
    """

    codes: str
    num_workers: int
    batch_size: int
    images_per_second: tuple[float, ...]
    needed_per_second: float

    @property
    def ratio(self) -> float:
        """How many such GPUs this machine can feed."""
        return median(self.images_per_second) / self.needed_per_second

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain data."""
        return asdict(self) | {"median": median(self.images_per_second), "ratio": self.ratio}


def measure(num_images: int, num_workers: int, batch_size: int, repeats: int) -> Iterator[Reading]:
    """Measure reading of tokens, then of latents' moments, from shards made for it in a temporary folder.

    An epoch is read before, so that the files are in memory as far as it reaches: what is measured is the program, not
    the disk.
    """
    for index, needed in ((token_index(num_images), masked_need()), (moment_index(num_images), diffusion_need())):
        with random_shards(index) as location:
            stream = TrainingStream(location, index, batch_size, num_workers, global_batch_size=batch_size)
            speeds = [images_per_second(ShardLoader(stream)) for _ in range(1 + repeats)][1:]
            codes = "tokens" if index.num_codes else "moments of latents"
            yield Reading(codes, num_workers, batch_size, tuple(speeds), needed)


def images_per_second(loader: ShardLoader) -> float:
    """Time one epoch, the start of the loader processes with it."""
    began = time.perf_counter()
    count = sum(len(batch.labels) for batch in loader)
    return count / (time.perf_counter() - began)


def masked_need() -> float:
    """Training images per second that one GPU takes of the paper's scale L, at 24 layers passed through."""
    with torch.device("meta"):
        network = LoopedMaskedTransformer(1024, (16, 16), 1000, num_layers=8, scale="L")
    return FLOPS_PER_SECOND / flops_per_training_image(network.macs(3))


def diffusion_need() -> float:
    """The same of the paper's diffusion models, at 32 layers passed through."""
    with torch.device("meta"):
        network = LoopedDiT((4, 32, 32), 1000, 8, 2, scale="wide", block="film", condition_width=1024)
    return FLOPS_PER_SECOND / flops_per_training_image(network.macs(4))


def flops_per_training_image(macs: int) -> int:
    """Two operations to a multiply–accumulate, and three forward passes to a step: backward counts twice."""
    return 2 * 3 * macs


def token_index(num_images: int) -> ShardIndex:
    """Describe MaskGIT's tokens of ImageNet 256×256, with mirror images."""
    return _index(num_images, copies=2, input_shape=(16, 16), stored_shape=(256,), num_codes=1024, latent_scale=None)


def moment_index(num_images: int) -> ShardIndex:
    """Describe the moments of Stable Diffusion's autoencoder for ImageNet 256×256."""
    return _index(
        num_images, copies=1, input_shape=(4, 32, 32), stored_shape=(8, 32, 32), num_codes=None, latent_scale=0.18215
    )


def _index(num_images: int, **codes: Any) -> ShardIndex:
    shards = tuple(Shard(shard_name(number), num_images // 4) for number in range(4))
    return ShardIndex(tuple(map(str, range(1000))), 256, tokenizer={}, crop="none", shards=shards, **codes)


@contextmanager
def random_shards(index: ShardIndex) -> Iterator[str]:
    """Write random codes as `elt encode` does, and give the folder while it lasts."""
    generator = np.random.default_rng(0)
    shape = (index.copies, *index.stored_shape)
    with TemporaryDirectory() as location:
        folder, number = ShardFolder(Path(location), {}), 0
        for place, shard in enumerate(index.shards):
            with folder.writing(place) as writer:
                for _ in range(shard.num_samples):
                    if index.num_codes is None:
                        codes = generator.standard_normal(shape).astype(np.float16)
                    else:
                        codes = generator.integers(0, index.num_codes, shape).astype(np.int16)
                    label = number % len(index.classes)
                    writer.add(
                        Picture(f"n{label:08d}/n{label:08d}_{number}.JPEG", "", label=label, number=number), codes
                    )
                    number += 1
        yield location

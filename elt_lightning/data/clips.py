"""Clips cut out of videos and brought to one size.

Letters: F frames of a clip, S its height and width in pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from elt_lightning.data.decoding import BrokenClipError, num_frames, read_clip

CROP = "short-side-bilinear-centre"
"""How frames are brought to their size, see :func:`resize_and_crop`."""


class Video(NamedTuple):
    """A labelled video."""

    name: str  # below the root of its data set
    path: str  # of the file
    label: int  # number of its class


@dataclass(frozen=True)
class ClipShape:
    """What is cut out of a video."""

    num_frames: int = 16  # F
    size: int = 128  # S; the short side is resized to it, and the middle of the long side kept
    stride: int = 1  # frames of the video from one frame of the clip to the next

    def __post_init__(self) -> None:
        if min(self.num_frames, self.size, self.stride) < 1:
            raise ValueError(f"num_frames, size and stride must be at least 1: {self}")

    @property
    def span(self) -> int:
        """Count the frames of the video from a clip's first to its last."""
        return (self.num_frames - 1) * self.stride + 1

    def num_starts(self, path: str | Path) -> int:
        """Count the places in a video where a clip can begin.

        Raises:
            BrokenClipError: it cannot be read, or is too short for a clip.
        """
        starts = num_frames(path) - self.span + 1
        if starts < 1:
            raise BrokenClipError(f"too short: {starts + self.span - 1} frames, where a clip needs {self.span}")
        return starts

    def read(self, path: str | Path, start: int) -> Tensor:
        """Read the clip (3, F, S, S) uint8 that begins at frame ``start`` (BrokenClipError: it cannot be read)."""
        return resize_and_crop(read_clip(path, start, self.num_frames, self.stride), self.size)


def resize_and_crop(frames: Tensor, size: int) -> Tensor:
    """Resize frames until their short side is ``size``, and keep the middle of the long side.

    Bilinear with antialiasing (torch's ``interpolate``), on bytes: on floats it gives the same to within one level.
    (F, H, W, 3) uint8 become (3, F, S, S) uint8.
    """
    pixels = frames.permute(0, 3, 1, 2)
    height, width = pixels.shape[2:]
    short = min(height, width)
    if short != size:
        height, width = round(height * size / short), round(width * size / short)
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, :, top : top + size, left : left + size].transpose(0, 1).contiguous()


def fixed_start(num_starts: int, number: int, clips_per_video: int) -> int:
    """Return where clip ``number`` of a video begins, the same in every run.

    The places where a clip can begin are cut into ``clips_per_video`` equal stretches, and the middle of each is taken;
    so a single clip is the video's middle. Clips of a short video overlap, and may be the same.
    """
    return (2 * number + 1) * (num_starts - 1) // (2 * clips_per_video)

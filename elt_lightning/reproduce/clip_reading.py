"""How much of moving digits a tokenizer of clips keeps: PSNR, and whether the digits can still be read."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.data.clips import ClipShape, fixed_start, resize_and_crop
from elt_lightning.data.toy.moving_digits import MARGIN, MOTIONS, VIDEOS, MovingDigits
from elt_lightning.metrics.digits import MADE, DigitNetwork, train_digit_network
from elt_lightning.metrics.handwriting import SIDE, Handwriting, load_handwriting
from elt_lightning.metrics.small_networks import load_or_train
from elt_lightning.tokenizers.video_vq import VideoVQ

FINER = 4
"""A writing is cut out at this many times its resolution, then averaged."""

FRAMES_APART = 8
"""Frames that the digit network learns from are this far apart."""


@dataclass(frozen=True)
class Kept:
    """What a tokenizer keeps of held-out clips; shares are of single frames, and in [0, 1]."""

    psnr: float  # mean over clips, in dB
    read: float  # frames whose digit the network reads rightly after encoding and decoding
    read_before: float  # the same of the clips themselves
    frames: int

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.1f} dB, and the digit network reads {self.read:.1%} of {self.frames:,} held-out digits "
            f"after it, {self.read_before:.1%} before"
        )


@torch.no_grad()
def measure(digits: MovingDigits, root: Path, tokenizer: VideoVQ, stride: int) -> Kept:
    """Encode and decode the middle of every held-out video of sharp digits, and read each frame before and after.

    Args:
        digits: what was written.
        root: folder of the videos, and of the network that reads, which is trained there once.
        tokenizer: of clips.
        stride: frames of the video from one frame of a clip to the next.
    """
    frames, height = tokenizer.sample_shape[:2]
    network, shape = load_reader(digits, root, height), ClipShape(frames, height, stride)
    psnr, right = [], []
    for video in digits.videos():
        if not video.val:
            continue
        path = root / VIDEOS / video.name
        start = fixed_start(shape.num_starts(path), 0, 1)
        clip = shape.read(path, start) / 255
        decoded = tokenizer.decode(tokenizer.encode(clip[None]))[0]
        psnr.append(-10 * (decoded - clip).square().mean().log10())
        places = digits.place(video.motion, video.number)[0][start : start + shape.span : stride]
        both = [network(writings(pixels.mean(0), places)) for pixels in (decoded, clip)]
        right.append(torch.stack(both).argmax(2) == video.digit)
    after, before = torch.cat(right, 1).double().mean(1).tolist()
    return Kept(float(torch.stack(psnr).mean()), after, before, len(right) * frames)


def load_reader(digits: MovingDigits, root: Path, side: int) -> DigitNetwork:
    """Load the network that reads digits in frames from its cache, or train it once, seeded, and write the cache."""
    path = root / f"sharp_digit_network_{side}.safetensors"
    return load_or_train(DigitNetwork(), path, train_digit_network, partial(as_shown, digits, side), MADE)


def as_shown(digits: MovingDigits, side: int, val: bool) -> Handwriting:
    """Return all handwriting of one kind as frames of ``side`` pixels show it, in all motions, sizes and places."""
    handwriting, images, labels = load_handwriting(val), [], []
    for number, (image, label) in enumerate(zip(handwriting.images, handwriting.labels, strict=True)):
        motion = list(MOTIONS)[number % len(MOTIONS)]
        frames = resize_and_crop(digits.draw(motion, image[0], number)[::FRAMES_APART], side)
        images.append(writings(frames[0] / 255, digits.place(motion, number)[0][::FRAMES_APART]))
        labels.append(label.expand(len(images[-1])))
    return Handwriting(torch.cat(images), torch.cat(labels))


def writings(frames: Tensor, places: Tensor) -> Tensor:
    """Cut the writing out of frames (F, S, S), at ``places`` (F, 2, 3) of `MovingDigits.place`: (F, 1, 8, 8)."""
    zoom, shift = places[:, :1, :1], places[:, :, 2:]
    inverse = torch.cat([torch.eye(2) / zoom, -shift / zoom], 2)
    side = FINER * (SIDE + 2 * MARGIN)
    grid = F.affine_grid(inverse, [len(frames), 1, side, side], align_corners=False)
    ink = F.avg_pool2d(F.grid_sample(frames[:, None], grid, align_corners=False), FINER)
    return ink[..., MARGIN:-MARGIN, MARGIN:-MARGIN]

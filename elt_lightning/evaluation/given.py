"""The part of a clip or picture that `elt sample` is given, to draw the rest: frame prediction and inpainting.

The tokenizer sees nothing of what is to be drawn: later frames are replaced by the last given one and a hole by grey,
as in COMMIT of MAGVIT (Yu et al. 2023, arXiv:2212.05199, section 3.2), before the whole is encoded.

Letters: C channels, F frames, H W height and width in pixels, T tokens, V codes.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from elt_lightning.data.clips import ClipShape
from elt_lightning.data.crops import Picture, adm_centre_crop, decode_picture
from elt_lightning.errors import UserError
from elt_lightning.evaluation.known import grey_out
from elt_lightning.model import ELTModel
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.vq_network import times

Hole = tuple[int, int, int, int]
"""Top, left, bottom and right of a rectangle, in cells of the grid of tokens or latents, the last two not included."""


class Given(NamedTuple):
    """A part of one sample."""

    known: Tensor  # (1, T) tokens, V where nothing is given; or latents (1, C, …), NaN there
    pixels: Tensor  # (1, C, F, H, W) or (1, C, H, W) float in [0, 1], what the tokenizer saw


def read_given(
    path: Path, module: ELTModel, tokenizer: Tokenizer, frames: int | None, hole: Hole | None, stride: int = 1
) -> Given:
    """Read a clip or a picture, as the model's samples are, and encode what is given of it.

    Given are the first ``frames`` of the grid of tokens, and all but a ``hole`` in every frame; None for no such limit.
    A clip takes every ``stride``-th frame of the file.

    Raises:
        UserError: the file cannot be read, or the given part does not lie in the grid.
    """
    grid, codebook_size = module.grid, module.codebook_size
    if stride != 1 and len(grid) != 3:
        raise UserError(f"--given_stride: the model draws pictures, which have no frames to take every {stride}th of")
    unknown = torch.zeros(grid, dtype=torch.bool, device=module.device)
    if frames is not None:
        if len(grid) != 3 or not 0 < frames < grid[0]:
            raise UserError(f"--given_frames: {frames} frames cannot be given of a grid of {times(grid)}")
        unknown[frames:] = True
    if hole is not None:
        if len(hole) != 4:
            raise UserError(f"--hole: {hole} has not four numbers: top, left, bottom, right")
        top, left, bottom, right = hole
        if not (0 <= top < bottom <= grid[-2] and 0 <= left < right <= grid[-1]):
            raise UserError(f"--hole: {hole} is no rectangle in a grid of {grid[-2]} rows and {grid[-1]} columns")
        unknown[..., top:bottom, left:right] = True
    codes = torch.zeros(1, *module.network.sample_shape, device=module.device)
    shape = tokenizer.decode(codes if codebook_size is None else codes.long()).shape[1:]
    pixels = hide(read_pixels(path, shape, stride).to(module.device) / 255, unknown, frames)
    known = tokenizer.encode(pixels[None])
    if codebook_size is None:
        return Given(known.masked_fill(unknown, torch.nan), pixels[None])
    return Given(known.masked_fill(unknown.flatten(), codebook_size), pixels[None])


def hide(pixels: Tensor, unknown: Tensor, frames: int | None) -> Tensor:
    """Hide what is unknown of pixels: later frames behind the last given one, everything else behind grey.

    Args:
        pixels: (C, F, H, W) or (C, H, W).
        unknown: (grid) bool, the cells that are not given.
        frames: of the grid, which are given; None for all.
    """
    if frames is not None:
        given = frames * pixels.shape[1] // unknown.shape[0]
        pixels = pixels[:, torch.arange(pixels.shape[1], device=pixels.device).clamp(max=given - 1)]
        unknown = unknown[:frames].any(0).expand_as(unknown)  # beyond the given frames only their hole is grey
    return grey_out(pixels[None], unknown[None])[0]


def read_pixels(path: Path, shape: torch.Size, stride: int) -> Tensor:
    """Read the beginning of a clip, or a picture, resized and cropped to (C, F, S, S) or (C, S, S), in [0, 255].

    Raises:
        UserError: it cannot be read.
    """
    size = shape[-1]
    try:
        if len(shape) == 4:
            pixels = ClipShape(shape[1], size, stride).read(path, start=0)
        else:
            picture = decode_picture(Picture(str(path), str(path)).read(), upright=True)
            pixels = torch.from_numpy(adm_centre_crop(picture, size)).permute(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # whatever a decoder raises
        kind = "a clip such as an AVI or MP4 file" if len(shape) == 4 else "a picture"
        raise UserError(f"--given: {path} cannot be read as {kind}: {error}") from error
    return pixels if shape[0] == 3 else pixels.float().mean(0, keepdim=True)

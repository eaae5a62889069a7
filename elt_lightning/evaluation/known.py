"""What is given of samples: grey in place of the rest, for tokenizers that must not see it and for people."""

from torch import Tensor

from elt_lightning.tokenizers.base import Tokenizer

GREY = 0.5


def grey_out(pixels: Tensor, unknown: Tensor) -> Tensor:
    """Replace what is unknown by grey.

    Args:
        pixels: (B, C, F, H, W) or (B, C, H, W) float in [0, 1].
        unknown: (B or 1, *grid) bool, the cells that are not given; the grid divides frames, height and width.
    """
    for axis, size in enumerate(pixels.shape[2:], start=1):
        unknown = unknown.repeat_interleave(size // unknown.shape[axis], axis)
    return pixels.masked_fill(unknown[:, None], GREY)


def known_pixels(known: Tensor, grid: tuple[int, ...], codebook_size: int | None, tokenizer: Tokenizer) -> Tensor:
    """Decode what is given of samples: pixels (B, C, …) float in [0, 1], grey elsewhere.

    Args:
        known: (B, T) tokens, V where nothing is given; or latents (B, C, *grid), NaN there.
        grid: cells along each side.
        codebook_size: V, or None for latents.
        tokenizer: of these codes.
    """
    if codebook_size is None:
        unknown = known.isnan().any(1)
        return grey_out(tokenizer.decode(known.nan_to_num(0.0)), unknown)
    unknown = known == codebook_size
    return grey_out(tokenizer.decode(known.masked_fill(unknown, 0)), unknown.view(-1, *grid))

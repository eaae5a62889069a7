"""Grey levels as tokens: for pictures small enough that each pixel can be a token."""

import math
from typing import Any

from torch import Tensor

from elt_lightning.tokenizers.base import Tokenizer


class PixelTokenizer(Tokenizer):
    """Quantise each pixel to one of ``levels`` evenly spaced grey levels; exact for pictures that have no others.

    Args:
        levels: number of codes.
        shape: the pictures' (height, width); tokens are row-major.
    """

    def __init__(self, levels: int, shape: tuple[int, int]) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"a pixel needs at least 2 levels, not {levels}")
        self.levels, self.shape = levels, tuple(shape)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 1, H, W) float in [0, 1] to (B, H·W) int64 in [0, levels)."""
        return (pixels * (self.levels - 1)).round().long().flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (B, H·W) int64 to (B, 1, H, W) float in [0, 1]."""
        return (codes / (self.levels - 1)).unflatten(1, (1, *self.shape))

    def init_args(self) -> dict[str, Any]:  # noqa: D102
        return {"levels": self.levels, "shape": list(self.shape)}

    def extra_repr(self) -> str:  # noqa: D102
        return f"levels={self.levels}, tokens={math.prod(self.shape)}"

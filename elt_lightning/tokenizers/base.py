"""What a tokenizer offers, and the one way from pixels to bytes."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Tokenizer(nn.Module, ABC):
    """Turns pictures into codes and back.

    Letters: B batch, C channels, H W height and width, T tokens.
    """

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, C, H, W) float in [0, 1] into codes: (B, T) int64 tokens, or float latents."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into pixels (B, C, H, W) float in [0, 1]."""

    def present(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, C, H, W) into bytes for people to look at: the pixels themselves, or with help to the eye."""
        return to_bytes(pixels)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Say in plain data how to build this tokenizer again: ``class_path``, ``init_args``, a file's ``sha256``."""


def to_bytes(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to uint8: ⌊255·x + 0.5⌋, whatever lies outside clipped."""
    return (pixels.float() * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)

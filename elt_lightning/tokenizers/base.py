"""What a tokenizer offers, and the one way from pixels to bytes."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elt_lightning.files import sha256


class Tokenizer(nn.Module, ABC):
    """Turns pictures into codes and back.

    Letters: B batch, C channels, H W height and width, T tokens.

    Attributes:
        path: the argument that says where its weights are; None where it has none.
        file: of the weights, where that is another one than ``path``.
    """

    path: str | None = None
    file: Path | None = None

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, C, H, W) float in [0, 1] into codes: (B, T) int64 tokens, or float latents."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into pixels (B, C, H, W) float in [0, 1]."""

    def present(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, C, H, W) into bytes for people to look at: the pixels themselves, or with help to the eye."""
        return to_bytes(pixels)

    def store(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, …) float in [0, 1] into what `elt encode` keeps: int16 tokens (B, T), or float16 latents."""
        codes = self.encode(pixels)
        return codes.to(torch.float16 if codes.is_floating_point() else torch.int16)

    def init_args(self) -> dict[str, Any]:
        """Return the arguments to build this again, as plain data."""
        return {} if self.path is None else {"path": str(self.path)}

    def description(self) -> dict[str, Any]:
        """Describe in plain data how to build this again: ``class_path``, ``init_args``, a file's ``sha256``."""
        how = {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": self.init_args()}
        file = self.file or self.path
        return how if file is None else how | {"sha256": sha256(file)}


class ImageTokenizer(Tokenizer):
    """Turns colour pictures of any size into codes that ``elt encode`` can keep on disk.

    Letters: B batch, C channels of latents, H W height and width in pixels, T tokens, V codes.

    Attributes:
        downsampling: pixels along a side of what one code stands for; H and W must be multiples of it.
        codebook_size: V, None for continuous latents.
        latent_channels: C, None for tokens.
        latent_scale: None where :meth:`store` returns the codes themselves. Otherwise it returns means and then
            standard deviations of the encoder's Gaussian, (B, 2·C, rows, columns), and latents are ``latent_scale`` ·
            (mean + std·ε).
    """

    downsampling: int
    codebook_size: int | None = None
    latent_channels: int | None = None
    latent_scale: float | None = None

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the token grid (rows, columns), or the latents' (C, rows, columns), of a picture of that size."""
        grid = (height // self.downsampling, width // self.downsampling)
        return grid if self.latent_channels is None else (self.latent_channels, *grid)


def to_bytes(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to uint8: ⌊255·x + 0.5⌋, whatever lies outside clipped."""
    return (pixels.float() * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)

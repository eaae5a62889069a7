"""The tokenizer of TATS (Ge et al. 2022, arXiv:2204.03638): clips of UCF-101 at 16×128×128 as 4×16×16 tokens.

The ready-made alternative to training one. Layout and arithmetic: github.com/songweige/TATS, tats/tats_vqgan.py and
tats/modules/codebook.py, with the settings that its README gives for UCF-101: 16384 codes of 256 channels, 32 filters,
downsampling 4×8×8, batch normalisation.

Letters: B batch, F H W frames, height and width in pixels, T tokens.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.serialization import safe_globals

from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.vq_network import squared_distances
from elt_lightning.training.weights import freeze, named_tensors

CHANNELS = (32, 64, 128, 256)
"""Of the encoder: at full size, and after each of its three blocks."""

DECODER_CHANNELS = (256, 256, 128, 64)
"""Of the decoder: at the token grid, and after each of its three blocks."""

STRIDES: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2), (1, 2, 2))
"""Of the blocks, in both: the last one leaves frames as they are."""

CODES, CODE_CHANNELS = 16384, 256

ROWS, COLUMNS = 16, 16
"""Of the token grid; TATS is trained at this size alone."""

TRAINING_ONLY = ("codebook.N", "codebook.z_avg", "image_discriminator.", "video_discriminator.", "perceptual_model.")
"""What a checkpoint holds besides, and tokens do not depend on."""

PUBLISHED = "github.com/songweige/TATS links to it under UCF-101, VQGAN"


class TATSVQGAN(Tokenizer):
    """The published VQGAN of TATS for UCF-101; other files of the same layout are read too.

    Frozen, and float32 unless ``.to(dtype)`` changes that. Parameters have the names of the published state dict.

    Args:
        path: the checkpoint, its ``state_dict`` alone as ``torch.save`` writes it, or that as safetensors. Of a
            checkpoint no code is run: plain data are read, and the ``argparse.Namespace`` of its settings.

    Raises:
        UserError: there is no such file, or it does not hold exactly this network.
    """

    codebook_size = CODES
    downsampling = (4, 8, 8)

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        with torch.device("meta"):
            self.encoder = Encoder()
            self.pre_vq_conv = SamePadConvolution(CHANNELS[-1], CODE_CHANNELS, 1)
            self.codebook = Codebook()
            self.post_vq_conv = SamePadConvolution(CODE_CHANNELS, DECODER_CHANNELS[0], 1)
            self.decoder = Decoder()
        state = {name: value for name, value in read_state(path).items() if not name.startswith(TRAINING_ONLY)}
        freeze(self, state, f"{path} is not the VQGAN of TATS", PUBLISHED)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: batch normalisation must keep to what it has learned."""
        return super().train(False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, F, H, W) float in [0, 1] to the nearest codes, (B, T) int64 in [0, 16384), row-major.

        T = F/4 · H/8 · W/8 runs over frames, rows, columns.
        """
        vectors = self.pre_vq_conv(self.encoder(pixels.to(self.codebook.embeddings.dtype) - 0.5))
        return torch.stack([self.codebook.nearest(clip.flatten(1).T) for clip in vectors])

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (B, T) int64 of clips at 128×128, T = F/4 · 256, to (B, 3, F, 128, 128) float in [0, 1].

        Raises:
            ValueError: T tokens make no such clip.
        """
        frames, rest = divmod(codes.shape[1], ROWS * COLUMNS)
        if rest or not frames:
            raise ValueError(f"{codes.shape[1]} tokens are no clip: every 4 frames have {ROWS}×{COLUMNS}")
        vectors = self.codebook.embeddings[codes].transpose(1, 2).unflatten(2, (frames, ROWS, COLUMNS))
        return (self.decoder(self.post_vq_conv(vectors)) + 0.5).clamp(0, 1)

    def code_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the token grid (frames, rows, columns) of a clip of that size in pixels.

        Raises:
            ValueError: the size does not divide into tokens.
        """
        shape = (frames, height, width)
        if any(side % step for side, step in zip(shape, self.downsampling, strict=True)):
            raise ValueError(f"{frames}×{height}×{width} is not a multiple of the tokenizer's 4×8×8")
        return tuple(side // step for side, step in zip(shape, self.downsampling, strict=True))


class Encoder(nn.Module):
    """Pixels (B, 3, F, H, W) in [−0.5, 0.5] to (B, 256, F/4, H/8, W/8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_first = SamePadConvolution(3, CHANNELS[0], 3)
        self.conv_blocks = nn.ModuleList(
            DownBlock(*channels, stride) for channels, stride in zip(pairwise(CHANNELS), STRIDES, strict=True)
        )
        self.final_block = normalised_swish(CHANNELS[-1])

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        hidden = self.conv_first(pixels)
        for block in self.conv_blocks:
            hidden = block(hidden)
        return self.final_block(hidden)


class Decoder(nn.Module):
    """Vectors (B, 256, frames, rows, columns) to pixels (B, 3, F, H, W), in [−0.5, 0.5] but for overshoot."""

    def __init__(self) -> None:
        super().__init__()
        self.final_block = normalised_swish(DECODER_CHANNELS[0])  # the published name of what comes first here
        self.conv_blocks = nn.ModuleList(
            UpBlock(*channels, stride) for channels, stride in zip(pairwise(DECODER_CHANNELS), STRIDES, strict=True)
        )
        self.conv_last = SamePadConvolution(DECODER_CHANNELS[-1], 3, 3)

    def forward(self, vectors: Tensor) -> Tensor:  # noqa: D102
        hidden = self.final_block(vectors)
        for block in self.conv_blocks:
            hidden = block(hidden)
        return self.conv_last(hidden)


class Codebook(nn.Module):
    """The vectors that codes stand for."""

    embeddings: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.empty(CODES, CODE_CHANNELS))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Find the nearest codes of vectors (N, 256) by squared distance: (N,) int64."""
        return squared_distances(vectors, self.embeddings).argmin(1)


class DownBlock(nn.Module):
    """A strided convolution, then a residual block."""

    def __init__(self, channels_in: int, channels_out: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.down = SamePadConvolution(channels_in, channels_out, 4, stride)
        self.res = ResidualBlock(channels_out)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.res(self.down(hidden))


class UpBlock(nn.Module):
    """A transposed convolution, then two residual blocks."""

    def __init__(self, channels_in: int, channels_out: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.up = SamePadTransposed(channels_in, channels_out, 4, stride)
        self.res1 = ResidualBlock(channels_out)
        self.res2 = ResidualBlock(channels_out)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.res2(self.res1(self.up(hidden)))


class ResidualBlock(nn.Module):
    """Two convolutions, each after batch normalisation and swish, and a shortcut past them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = SamePadConvolution(channels, channels, 3)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = SamePadConvolution(channels, channels, 3)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        output = self.conv1(F.silu(self.norm1(hidden)))
        return hidden + self.conv2(F.silu(self.norm2(output)))


class SamePadConvolution(nn.Module):
    """A convolution whose input is widened by copies of its border, so that sides shrink by the stride alone."""

    def __init__(
        self, channels_in: int, channels_out: int, side: int, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.pads = border(side, stride)
        self.conv = nn.Conv3d(channels_in, channels_out, side, stride)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.conv(F.pad(hidden, self.pads, mode="replicate"))


class SamePadTransposed(nn.Module):
    """A transposed convolution of an input widened likewise: sides grow by the stride."""

    def __init__(self, channels_in: int, channels_out: int, side: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.pads = border(side, stride)
        self.convt = nn.ConvTranspose3d(channels_in, channels_out, side, stride, padding=side - 1)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.convt(F.pad(hidden, self.pads, mode="replicate"))


def border(side: int, stride: tuple[int, int, int]) -> tuple[int, ...]:
    """Return how many cells to add: before and after the last axis, then the ones before it, as ``F.pad`` wants them.

    Of ``side`` − stride cells along an axis the odd one comes before.
    """
    added = [side - step for step in reversed(stride)]
    return tuple(cells for count in added for cells in (math.ceil(count / 2), count // 2))


def normalised_swish(channels: int) -> nn.Sequential:
    """Batch normalisation, then swish."""
    return nn.Sequential(nn.BatchNorm3d(channels), nn.SiLU())


def read_state(path: str) -> dict[str, Tensor]:
    """Read the tensors by name of a Lightning checkpoint, a state dict or a safetensors file.

    Raises:
        UserError: there is no such file, or it cannot be read without running code of it.
    """
    if not is_file(path):
        raise UserError(f"there is no file {path}, the VQGAN of TATS: {PUBLISHED}; `elt sample` takes --tokenizer_path")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # a Namespace is a bag of attributes: to rebuild one runs nothing but object.__new__ and dict.update
        with safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: fetch or convert it anew") from error
    except Exception as error:  # whatever a broken file, or one with other classes in it, makes the unpickler raise
        raise UserError(
            f"{path} is damaged, or holds more than data ({type(error).__name__}): fetch it anew, or, if you trust it, "
            f'leave its tensors alone in it with python -c "import torch; '
            f"torch.save(torch.load('{path}', 'cpu', weights_only=False)['state_dict'], 'tats.pt')\", "
            "where the packages that wrote it are installed, and give tats.pt"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    return named_tensors(state, f"{path} is not the VQGAN of TATS", PUBLISHED)

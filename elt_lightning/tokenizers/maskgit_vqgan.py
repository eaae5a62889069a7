"""The tokenizer of MaskGIT (Chang et al. 2022, arXiv:2202.04200): ImageNet at 256×256 as 16×16 tokens of 1024 codes."""

import math
import pickle
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.tokenizers.base import ImageTokenizer
from elt_lightning.training.weights import freeze, named_tensors

CHANNELS = (128, 128, 256, 256, 512)
"""Of the five levels, full size first; each has half the height and width of the one before it."""

CODE_CHANNELS = 256

PUBLISHED = "`hf download fun-research/TiTok maskgit-vqgan-imagenet-f16-256.bin --local-dir .` fetches it"


class MaskGITVQGAN(ImageTokenizer):
    """The published VQGAN: convolutions down to one vector per 16×16 pixels, each taken to its nearest codebook entry.

    Trained on 256×256 pixels; other heights and widths that are multiples of 16 work too. Parameters have the names of
    the PyTorch state dict (huggingface/open-muse, ``muse/modeling_maskgit_vqgan.py``) and cannot be trained.
    Letters: B batch, H W height and width in pixels, T tokens.

    Args:
        path: the state dict: ``maskgit-vqgan-imagenet-f16-256.bin`` of ``fun-research/TiTok`` on Hugging Face, the same
            as safetensors, or a folder with ``model.safetensors`` or ``pytorch_model.bin``.

    Raises:
        UserError: there is no such file, or it does not hold exactly this network.
    """

    downsampling = 16
    codebook_size = 1024

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.file = weights_file(path)
        with torch.device("meta"):
            self.encoder = Encoder()
            self.decoder = Decoder()
            self.quantize = Codebook(self.codebook_size)
        freeze(self, read_state_dict(self.file), f"{self.file} is not the MaskGIT VQGAN", PUBLISHED)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [0, 1] to the nearest codes by squared distance, (B, T) int64 in [0, 1024), row-major.

        T = H/16 · W/16.
        """
        vectors = self.encoder(pixels.to(self.quantize.embedding.weight.dtype))
        return self.quantize.nearest(vectors.flatten(2).transpose(1, 2))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (B, T) int64 of a square picture to (B, 3, 16·√T, 16·√T) float in [0, 1].

        Raises:
            ValueError: T is not a square number.
        """
        side = math.isqrt(codes.shape[1])
        if side**2 != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} tokens are no square picture")
        vectors = self.quantize.embedding(codes).transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(vectors).clamp(0, 1)


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to vectors (B, 256, H/16, W/16)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(*channels) for channels in pairwise((CHANNELS[0], *CHANNELS)))
        self.mid = two_blocks(CHANNELS[-1], CHANNELS[-1])
        self.norm_out = normalization(CHANNELS[-1])
        self.conv_out = nn.Conv2d(CHANNELS[-1], CODE_CHANNELS, 1)

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        hidden = self.conv_in(pixels)
        for number, level in enumerate(self.down):
            hidden = level(hidden if number == 0 else F.avg_pool2d(hidden, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Vectors (B, 256, rows, columns) to pixels (B, 3, 16·rows, 16·columns), in [0, 1] but for overshoot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CODE_CHANNELS, CHANNELS[-1], 3, padding=1)
        self.mid = two_blocks(CHANNELS[-1], CHANNELS[-1])
        # listed as the encoder's levels are, full size first, and run from the last to the first
        self.up = nn.ModuleList(
            Level(wide, narrow, upsample=number > 0)
            for number, (narrow, wide) in enumerate(pairwise((*CHANNELS, CHANNELS[-1])))
        )
        self.norm_out = normalization(CHANNELS[0])
        self.conv_out = nn.Conv2d(CHANNELS[0], 3, 3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:  # noqa: D102
        hidden = self.mid(self.conv_in(vectors))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Codebook(nn.Module):
    """The vectors that codes stand for."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, CODE_CHANNELS)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Find the nearest codes of vectors (…, 256) by squared distance: (…,) int64."""
        codes = self.embedding.weight
        # |v − c|² less |v|², which is the same for every code
        return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(-1)


class Level(nn.Module):
    """Residual blocks at one size of picture; with ``upsample``, then on to twice the height and width."""

    def __init__(self, channels_in: int, channels_out: int, upsample: bool = False) -> None:
        super().__init__()
        self.block = two_blocks(channels_in, channels_out)
        self.upsample_conv = nn.Conv2d(channels_out, channels_out, 3, padding=1) if upsample else None

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        hidden = self.block(hidden)
        if self.upsample_conv is None:
            return hidden
        return self.upsample_conv(F.interpolate(hidden, scale_factor=2, mode="nearest"))


class ResidualBlock(nn.Module):
    """Two convolutions, each after normalisation and SiLU, and a shortcut past them.

    Where the number of channels changes, the published network has no true shortcut: ``nin_shortcut`` sees the block's
    own output, not its input. The weights were trained that way.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = normalization(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = normalization(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        changes = channels_in != channels_out
        self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False) if changes else None

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        output = self.conv1(F.silu(self.norm1(hidden)))
        output = self.conv2(F.silu(self.norm2(output)))
        return output + (hidden if self.nin_shortcut is None else self.nin_shortcut(output))


def two_blocks(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two residual blocks; the first may change the number of channels."""
    return nn.Sequential(ResidualBlock(channels_in, channels_out), ResidualBlock(channels_out, channels_out))


def normalization(channels: int) -> nn.GroupNorm:
    """Group normalisation as it is everywhere in this network."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def weights_file(path: str) -> Path:
    """Find the weights: ``path`` itself, or a file of one of the usual names in it (UserError: there is none)."""
    given = Path(path)
    files = [given / name for name in ("model.safetensors", "pytorch_model.bin")] if given.is_dir() else [given]
    found = next((file for file in files if is_file(file)), None)
    if found is None:
        missing = f"no {' or '.join(file.name for file in files)} in {path}" if given.is_dir() else f"no file {path}"
        raise UserError(f"there is {missing}, the MaskGIT VQGAN: {PUBLISHED}; `elt sample` takes --tokenizer_path")
    return found


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or from what ``torch.save`` wrote; no code of the file is run.

    Raises:
        UserError: the file cannot be read so.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable file of weights: it is damaged or of another kind") from error
    return named_tensors(state, f"{file} is not the MaskGIT VQGAN", PUBLISHED)

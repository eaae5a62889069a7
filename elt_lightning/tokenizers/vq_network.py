"""MAGVIT's vector-quantised autoencoder (Yu et al. 2023, arXiv:2212.05199), of clips in 3-D or of pictures in 2-D.

Layers, their order and how they are initialised: github.com/google-research/magvit, videogvt/models/enc_dec_3dcnn.py,
enc_dec_2dcnn.py and vqvae.py; sizes: videogvt/configs/vqgan3d_ucf101_config.py. In 2-D it is the same network with
square kernels.

Letters: B batch, F H W frames, height and width in pixels, T tokens, V codes, D channels of a code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class VQSettings:
    """The shape of a network; the defaults are MAGVIT's base size, B. Its large one, L, has 128 filters.

    Raises:
        ValueError: a value is out of range.
    """

    dimensions: int = 3  # 3 for clips, 2 for pictures
    filters: int = 64  # channels at full size, an even number
    # of ``filters``, one for each level, full size first; each level has half the height and width
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    residual_blocks: int = 2  # in a level, and again at the smallest size
    # at how many of the changes of level, counted from full size, frames are halved too. Means nothing in 2-D
    temporal_levels: int = 2
    codebook_size: int = 1024  # V
    code_channels: int = 256  # D
    # what 3×3×3 kernels see beyond the border. MAGVIT's paper: reflect, which needs at least two cells along every side
    # of the token grid; its published config of UCF-101: zeros
    padding: Literal["reflect", "replicate", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        if self.dimensions not in CONVOLUTIONS:
            raise ValueError(f"dimensions must be 2 or 3, not {self.dimensions}")
        if self.filters < 2 or self.filters % 2:
            raise ValueError(f"filters must be an even number, not {self.filters}")
        if (
            not self.multipliers
            or min(*self.multipliers, self.residual_blocks, self.codebook_size, self.code_channels) < 1
        ):
            raise ValueError(
                f"multipliers, residual_blocks, codebook_size and code_channels must be at least 1: {self}"
            )
        if not 0 <= self.temporal_levels < len(self.multipliers) and self.dimensions == 3:
            raise ValueError(
                f"temporal_levels must lie in [0, {len(self.multipliers) - 1}], the changes between "
                f"{len(self.multipliers)} levels, not {self.temporal_levels}"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, full size first."""
        return tuple(self.filters * multiplier for multiplier in self.multipliers)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Factors by which (F, H, W), or (H, W), shrink from each level to the next."""
        changes = range(len(self.multipliers) - 1)
        if self.dimensions == 2:
            return ((2, 2),) * len(changes)
        return tuple((2 if change < self.temporal_levels else 1, 2, 2) for change in changes)

    @property
    def downsampling(self) -> tuple[int, ...]:
        """Frames, height and width in pixels, or height and width, of what one token stands for."""
        return tuple(math.prod(factors) for factors in zip((1,) * self.dimensions, *self.factors, strict=True))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token grid of a clip (F, H, W) or a picture (H, W).

        Raises:
            ValueError: the shape does not divide into tokens, or the padding needs more of them.
        """
        cells = [] if len(shape) != self.dimensions else [*map(divmod, shape, self.downsampling)]
        if not cells or any(rest for _, rest in cells):
            raise ValueError(f"{times(shape)} is not a multiple of the tokenizer's {times(self.downsampling)}")
        grid = tuple(whole for whole, _ in cells)
        if min(grid) < (2 if self.padding == "reflect" else 1):
            raise ValueError(
                f"{times(shape)} gives a grid of {times(grid)} tokens: with padding {self.padding} "
                "every side needs at least two; padding zeros or replicate does not"
            )
        return grid


class Quantized(NamedTuple):
    """What the quantiser makes of N = B·T vectors, float32."""

    # (B, D, *grid), values of the codes, with gradients as if they were the encoder's (straight-through)
    passed_on: Tensor
    codes: Tensor  # (N,) int64, the nearest codes
    vectors: Tensor  # (N, D), the encoder's
    chosen: Tensor  # (N, D), the codes' own, with gradients to the codebook
    distances: Tensor  # (N, V), squared, of every vector to every code


class VQNetwork(nn.Module):
    """Encoder, quantiser and decoder."""

    def __init__(self, settings: VQSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.quantizer = Quantizer(settings.codebook_size, settings.code_channels)
        self.decoder = Decoder(settings)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                initialize(module)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruct pixels (B, 3, F, H, W) or (B, 3, H, W) float in [0, 1]; what comes out may overshoot."""
        quantized = self.quantizer(self.encoder(pixels))
        return self.decoder(quantized.passed_on), quantized

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, F, H, W) or (B, 3, H, W) float in [0, 1] to (B, T) int64 in [0, V), row-major over the grid.

        Raises:
            ValueError: the size does not divide into tokens.
        """
        self.settings.grid(tuple(pixels.shape[2:]))
        return self.quantizer(self.encoder(pixels)).codes.unflatten(0, (len(pixels), -1))

    def decode(self, codes: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Decode (B, T) int64, row-major over the ``grid``, to pixels (B, 3, …) float, in [0, 1] but for overshoot."""
        vectors = self.quantizer.codebook[codes].transpose(1, 2).unflatten(2, grid)
        return self.decoder(vectors)


class Quantizer(nn.Module):
    """Take vectors to the nearest codes by squared distance, in float32 whatever the precision around it."""

    def __init__(self, codebook_size: int, channels: int) -> None:
        super().__init__()
        # uniform of variance 1/V, as flax's variance_scaling with fan_in makes of a (V, D) array
        self.codebook = nn.Parameter(
            torch.empty(codebook_size, channels).uniform_(-1, 1) * math.sqrt(3 / codebook_size)
        )

    def forward(self, encoded: Tensor) -> Quantized:
        """Quantise (B, D, *grid)."""
        with torch.autocast(encoded.device.type, enabled=False):
            encoded = encoded.to(self.codebook.dtype)
            vectors = encoded.movedim(1, -1).flatten(0, -2)
            distances = squared_distances(vectors, self.codebook)
            codes = distances.argmin(1)
            chosen = self.codebook[codes]
            values = chosen.detach().view(len(encoded), *encoded.shape[2:], -1).movedim(-1, 1)
            # written so, it has the very values that decoding the codes starts from
            passed_on = values + (encoded - encoded.detach())
        return Quantized(passed_on, codes, vectors, chosen, distances)


class Encoder(nn.Module):
    """Pixels (B, 3, F, H, W) or (B, 3, H, W) to vectors (B, D, *grid)."""

    def __init__(self, settings: VQSettings) -> None:
        super().__init__()
        channels = settings.channels
        self.factors, self.pool = settings.factors, F.avg_pool2d if settings.dimensions == 2 else F.avg_pool3d
        self.conv_in = convolution(settings, 3, channels[0], bias=False)
        self.levels = nn.ModuleList(blocks(settings, *pair) for pair in pairwise((channels[0], *channels)))
        self.mid = blocks(settings, channels[-1], channels[-1])
        self.norm_out = normalization(channels[-1])
        self.conv_out = convolution(settings, channels[-1], settings.code_channels, side=1)

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        hidden = self.levels[0](self.conv_in(pixels))
        for factor, level in zip(self.factors, self.levels[1:], strict=True):
            hidden = level(self.pool(hidden, factor))
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Vectors (B, D, *grid) to pixels (B, 3, F, H, W) or (B, 3, H, W)."""

    def __init__(self, settings: VQSettings) -> None:
        super().__init__()
        channels = settings.channels
        self.factors = settings.factors
        self.conv_in = convolution(settings, settings.code_channels, channels[-1])
        self.mid = blocks(settings, channels[-1], channels[-1])
        # listed as the encoder's levels are, full size first, and run from the last to the first
        self.levels = nn.ModuleList(
            blocks(settings, wide, narrow) for narrow, wide in pairwise((*channels, channels[-1]))
        )
        self.upsampled = nn.ModuleList(convolution(settings, wide, wide) for wide in channels[1:])
        self.norm_out = normalization(channels[0])
        self.conv_out = convolution(settings, channels[0], 3)

    def forward(self, vectors: Tensor) -> Tensor:  # noqa: D102
        hidden = self.mid(self.conv_in(vectors))
        for factor, level, upsampled in reversed([*zip(self.factors, self.levels[1:], self.upsampled, strict=True)]):
            hidden = F.interpolate(level(hidden), scale_factor=[float(size) for size in factor], mode="nearest")
            hidden = upsampled(hidden)
        return self.conv_out(F.silu(self.norm_out(self.levels[0](hidden))))


class ResidualBlock(nn.Module):
    """Two convolutions, each after normalisation and swish, and a shortcut past them.

    Where the number of channels changes, the shortcut is a 1×1×1 convolution of the block's input; in MaskGIT's
    published network, of the block's own output.
    """

    def __init__(self, settings: VQSettings, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = normalization(channels_in)
        self.conv1 = convolution(settings, channels_in, channels_out, bias=False)
        self.norm2 = normalization(channels_out)
        self.conv2 = convolution(settings, channels_out, channels_out, bias=False)
        changes = channels_in != channels_out
        self.shortcut = convolution(settings, channels_in, channels_out, side=1, bias=False) if changes else None

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        output = self.conv1(F.silu(self.norm1(hidden)))
        output = self.conv2(F.silu(self.norm2(output)))
        return output + (hidden if self.shortcut is None else self.shortcut(hidden))


def inflate(flat: Mapping[str, Tensor], network: VQNetwork) -> dict[str, Tensor]:
    """Turn the weights of a 2-D network into a state dict for a 3-D one of the same settings otherwise.

    A flat kernel becomes the middle slice in time of a kernel that is zero elsewhere ("central inflation", MAGVIT
    section 3.1): a still clip gives in every frame what the 2-D network gives for its picture.
    """
    inflated = {}
    for name, deep in network.state_dict().items():
        weight = flat[name].to(deep)
        if weight.ndim < deep.ndim:
            kernel = torch.zeros_like(deep)
            kernel[:, :, deep.shape[2] // 2] = weight
            weight = kernel
        inflated[name] = weight
    return inflated


def squared_distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return |v − c|² of every vector (N, D) to every code (V, D): (N, V)."""
    return vectors.square().sum(1, keepdim=True) - 2 * vectors @ codes.T + codes.square().sum(1)


def convolution(
    settings: VQSettings, channels_in: int, channels_out: int, side: int = 3, bias: bool = True
) -> nn.Conv2d | nn.Conv3d:
    """Build a convolution that keeps the size, with a kernel of ``side`` along every axis."""
    # a kernel of one cell sees no border: the other modes would copy their input for nothing
    padding = settings.padding if side > 1 else "zeros"
    kind = CONVOLUTIONS[settings.dimensions]
    return kind(channels_in, channels_out, side, padding=side // 2, bias=bias, padding_mode=padding)


def initialize(layer: nn.Conv2d | nn.Conv3d) -> None:
    """Start as flax does: biases at 0, kernels of variance 1/fan_in, cut off at two standard deviations."""
    deviation = layer.weight[0].numel() ** -0.5 / 0.87962566  # the standard deviation that is left after the cut
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def blocks(settings: VQSettings, channels_in: int, channels_out: int) -> nn.Sequential:
    """Residual blocks at one size; the first may change the number of channels."""
    before = (channels_in, *[channels_out] * (settings.residual_blocks - 1))
    return nn.Sequential(*(ResidualBlock(settings, channels, channels_out) for channels in before))


def normalization(channels: int) -> nn.GroupNorm:
    """Normalise 32 groups of channels, as everywhere in MAGVIT; fewer where a group would have a single channel.

    A group of one channel would lose that channel's mean, which is where colour and brightness may be.
    """
    return nn.GroupNorm(math.gcd(32, channels // 2), channels, eps=1e-6)


def times(shape: tuple[int, ...]) -> str:
    """Write a size as people do: 16×128×128."""
    return "×".join(map(str, shape))

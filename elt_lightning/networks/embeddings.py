"""Embeddings, which stand outside the loop and are applied once."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.processes.conditioning import Condition


def initialise_truncated_normal(network: nn.Module, std: float = 0.02) -> None:
    """Initialise linear layers and embeddings as MaskGIT does: normal, cut at two standard deviations; biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class MaskedTokenEmbedding(nn.Module):
    """Class token first, then the tokens; a learned position added to each; layer norm and dropout (MaskGIT, BERT).

    Images and videos differ in the number of tokens alone: MaskGIT and MAGVIT learn one flat table of positions, in
    row-major order over (height, width) or (frames, height, width).

    Args:
        codebook_size: V; row V of the token table is the mask token.
        num_tokens: T.
        num_classes: row ``num_classes`` of the class table is the null class.
        width: D.
        dropout: after the layer norm.
    """

    def __init__(self, codebook_size: int, num_tokens: int, num_classes: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(codebook_size + 1, width)
        self.classes = nn.Embedding(num_classes + 1, width)
        self.positions = nn.Embedding(1 + num_tokens, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Embed: tokens (B, T) in [0, V], labels (B,) in [0, num_classes], to (B, 1 + T, D)."""
        h = torch.cat([self.classes(labels)[:, None], self.tokens(tokens)], dim=1)
        return self.dropout(self.norm(h + self.positions.weight))


def sinusoids(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return sines and cosines at ``count`` frequencies 10000^(−i/count), i = 0 … count − 1: two (…, count)."""
    # Multiplied before it is divided, as in DiT: at times of up to 1000 the order of rounding shows.
    exponents = -math.log(10_000.0) * torch.arange(count, dtype=values.dtype, device=values.device) / count
    angles = values[..., None] * torch.exp(exponents)
    return torch.sin(angles), torch.cos(angles)


def sine_positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Return the fixed position of every token of a grid, (T, D), row-major; for two axes as facebookresearch/DiT.

    Each axis has an equal share of the width, the last axis first: sines, then cosines of its coordinate. The rest is
    zero.

    Args:
        grid: tokens along each axis, (height, width) or (frames, height, width).
        width: D.
    """
    coordinates = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
    count = width // (2 * len(grid))
    parts = [part for axis in reversed(coordinates) for part in sinusoids(axis.flatten(), count)]
    return F.pad(torch.cat(parts, dim=-1), (0, width - 2 * count * len(grid))).float()


def patchify(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Cut (B, C, *size) into patches: (B, T, C·∏patch), tokens row-major, each patch ordered (channel, *patch axes)."""
    grid = [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    axes = len(patch)
    split = [part for pair in zip(grid, patch, strict=True) for part in pair]
    x = x.reshape(*x.shape[:2], *split)  # B C g₁ p₁ g₂ p₂ …
    grid_axes, patch_axes = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return x.permute(0, *grid_axes, 1, *patch_axes).flatten(1, axes).flatten(2)


def unpatchify(patches: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Undo :func:`patchify`: (B, T, C·∏patch) to (B, C, *size), size = grid·patch."""
    axes, batch = len(grid), patches.shape[0]  # not len(), by which an exported graph would fix B
    x = patches.reshape(batch, *grid, -1, *patch)  # B g₁ g₂ … C p₁ p₂ …
    interleaved = [axis for i in range(axes) for axis in (1 + i, 2 + axes + i)]
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    return x.permute(0, 1 + axes, *interleaved).reshape(batch, -1, *size)


class TimeClassEmbedding(nn.Module):
    """What a diffusion network is told besides its input: an embedded time plus an embedded class.

    Source: facebookresearch/DiT: 256 sinusoids of 1000·t, linear → SiLU → linear; a row per class.

    Args:
        num_classes: row ``num_classes`` of the class table is the null class.
        width: of the condition that comes out.
        time_scale: what t is multiplied by.
    """

    NUM_SINUSOIDS = 256

    def __init__(self, num_classes: int, width: int, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.time_in = nn.Linear(self.NUM_SINUSOIDS, width)
        self.time_out = nn.Linear(width, width)
        self.classes = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition) -> Tensor:
        """Embed labels (B,) and times (B,) in [0, 1]: (B, width)."""
        if condition.time is None:
            raise ValueError("a diffusion network needs condition.time")
        # In half precision neighbouring times would fall together: the sinusoids are computed in float32.
        sine, cosine = sinusoids(condition.time.float() * self.time_scale, self.NUM_SINUSOIDS // 2)
        sinusoid = torch.cat([cosine, sine], dim=-1).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(sinusoid))) + self.classes(condition.labels)

    def macs(self) -> int:
        """Count the multiply–accumulates for one sample."""
        return (self.NUM_SINUSOIDS + self.time_out.in_features) * self.time_out.out_features

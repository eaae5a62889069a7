"""The discriminator of MAGVIT's tokenizer: one logit for a whole clip or picture.

Layers and initialisation: github.com/google-research/magvit, videogvt/models/stylegan_discriminator_3d.py and
stylegan_discriminator_2d.py. It is StyleGAN2's residual discriminator without its statistics over the batch: each block
halves every side, and the shortcut is averaged as the block is. MAGVIT's 3-D blocks average 2×2×2 cells; ``blur``
smooths with [1, 2, 1] / 4 along every side before, which makes [1, 3, 3, 1] / 8 of the two together: the blur of
StyleGAN2 and of MaskGIT's VQGAN.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elt_lightning.tokenizers.vq_network import CONVOLUTIONS


class Discriminator(nn.Module):
    """Judge clips (B, 3, F, H, W) or pictures (B, 3, H, W) float in [0, 1]: logits (B, 1), positive for real.

    Args:
        shape: of a clip (frames, height, width) or a picture (height, width); a side that is odd when it is halved is
            rounded up.
        filters: channels at full size. MAGVIT: as many as the tokenizer has.
        multipliers: of ``filters``, one for each block. MAGVIT: (2, 4, 4, 4, 4) for 128×128 and (2, 4, 4, 4) for 64×64.
        blur: smooth before halving.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        filters: int = 64,
        multipliers: tuple[int, ...] = (2, 4, 4, 4, 4),
        blur: bool = False,
    ) -> None:
        super().__init__()
        if not multipliers or min(*shape, filters, *multipliers) < 1:
            raise ValueError(
                f"a discriminator needs filters and multipliers of at least 1, not {filters}, {multipliers}"
            )
        convolution = CONVOLUTIONS[len(shape)]
        channels = [filters, *(filters * multiplier for multiplier in multipliers)]
        cells = math.prod(-(-side // 2 ** len(multipliers)) for side in shape)
        self.conv_in = convolution(3, filters, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(len(shape), *pair, blur) for pair in pairwise(channels)))
        self.conv_out = convolution(channels[-1], channels[-1], 3, padding=1)
        self.hidden = nn.Linear(cells * channels[-1], channels[-1])
        self.logit = nn.Linear(channels[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        hidden = activation(self.conv_out(self.blocks(activation(self.conv_in(pixels)))))
        return self.logit(activation(self.hidden(hidden.flatten(1))))


class Block(nn.Module):
    """Two convolutions with halving between them, and a shortcut; their sum is scaled to keep its variance."""

    def __init__(self, dimensions: int, channels_in: int, channels_out: int, blur: bool) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]
        self.blur = blur
        self.conv1 = convolution(channels_in, channels_in, 3, padding=1)
        self.conv2 = convolution(channels_in, channels_out, 3, padding=1)
        self.shortcut = convolution(channels_in, channels_out, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        output = halve(activation(self.conv1(hidden)), self.blur)
        output = activation(self.conv2(output))
        return (output + self.shortcut(halve(hidden, self.blur))) / math.sqrt(2)


def activation(hidden: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2."""
    return F.leaky_relu(hidden, 0.2)


def halve(hidden: Tensor, blur: bool) -> Tensor:
    """Halve every side of (B, C, …), odd ones rounded up; an average counts the cells inside alone."""
    if blur:
        for axis in range(2, hidden.ndim):
            hidden = smooth(hidden, axis)
    pool = F.avg_pool2d if hidden.ndim == 4 else F.avg_pool3d
    window = [min(2, side) for side in hidden.shape[2:]]
    return pool(hidden, window, ceil_mode=True, count_include_pad=False)


def smooth(hidden: Tensor, axis: int) -> Tensor:
    """Weigh each cell along an axis with its neighbours, [1, 2, 1] / 4; beyond the border the last cell goes on."""
    size = hidden.shape[axis]
    longer = torch.cat([hidden.narrow(axis, 0, 1), hidden, hidden.narrow(axis, size - 1, 1)], axis)
    return (longer.narrow(axis, 0, size) + 2 * hidden + longer.narrow(axis, 2, size)) / 4

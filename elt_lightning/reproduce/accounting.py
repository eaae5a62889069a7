"""What the models of the paper's tables cost: parameters, and multiply–accumulates of a pass and of a sample.

All is counted from networks on the ``meta`` device, which take no memory; nothing is trained. FLOPs are twice the
multiply–accumulates (MACs).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from elt_lightning.commands.plan import read
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.networks.scales import SCALES
from elt_lightning.reproduce.published import Row


@dataclass(frozen=True)
class Count:
    """What one network costs at one loop count."""

    params_backbone: int  # parameters of the shared backbone
    params_total: int  # parameters of the whole network
    effective_depth: int  # D, the layers that a pass goes through
    forward_macs: int  # MACs of one pass of one sample, attention products included
    layer_macs: int  # of these, what the D layers take; embedding, modulation and head are the rest
    attention_macs: int  # of these, the products QKᵀ and PV
    passes: int = 1  # that drawing one sample takes: sampling steps, times two where guidance acts

    @property
    def sample_macs(self) -> int:
        """MACs of drawing one sample."""
        return self.passes * self.forward_macs


def count(network: LoopedNetwork, loops: int, passes: int = 1) -> Count:
    """Count a masked or diffusion network.

    Args:
        network: best built on the ``meta`` device.
        loops: L.
        passes: of the network for one sample.
    """
    backbone = network.backbone
    num_tokens = tokens_of(network)
    depth = backbone.effective_depth(loops)
    return Count(
        params_backbone=_parameters(backbone),
        params_total=_parameters(network),
        effective_depth=depth,
        forward_macs=network.macs(loops),
        layer_macs=backbone.macs(num_tokens, loops),
        attention_macs=depth * 2 * num_tokens**2 * network.width,
        passes=passes,
    )


def tokens_of(network: LoopedNetwork) -> int:
    """Count the tokens that the layers of a network see, a class token with them."""
    if isinstance(network, LoopedDiT):
        return math.prod(network.grid)
    if isinstance(network, LoopedMaskedTransformer):
        return 1 + math.prod(network.sample_shape)
    raise TypeError(f"{type(network).__name__} is neither a masked nor a diffusion network")


@cache
def count_row(row: Row) -> Count | None:
    """Count a row of Table 1, 2 or 4; None for a model that this project does not build.

    Raises:
        UserError: the row's config is missing: the current folder is not the repository's root.
    """
    if row.name is None or row.num_layers is None:
        return None
    module = read(["--config", str(row.config)])[2]
    module.sampler.steps = row.steps  # Table 4 has one model at two numbers of steps
    return count(module.network, row.loops, len(module.sampler.network_calls(row.loops)))


@cache
def count_scale(scale: str, num_layers: int | None = None, loops: int = 1) -> Count:
    """Count a masked ImageNet model of a named size, by default its unlooped baseline."""
    num_layers = num_layers or SCALES[scale].full_depth
    settings: dict[str, Any] = {"codebook_size": 1024, "input_shape": (16, 16), "num_classes": 1000, "scale": scale}
    with torch.device("meta"):
        network = LoopedMaskedTransformer(num_layers=num_layers, **settings)
    return count(network, loops)


def params_as_printed(row: Row, counted: Count) -> int:
    """Return the count that the paper's column means, by what its numbers come out at (inferred).

    Table 2 and MAGVIT-L count embeddings and head, the other rows do not.
    """
    whole = row.table == 2 or row.name == "magvit_l"
    return counted.params_total if whole else counted.params_backbone


def gflops_as_printed(row: Row, counted: Count) -> float:
    """Count what the paper calls GFLOPs, as far as its numbers say: 10⁹ MACs of a sample, in the layers alone.

    Table 4's include attention products, Table 1's row L does not (inferred). Two printed values of Table 1, of XL, do
    not come out.
    """
    macs = counted.layer_macs if row.table == 4 else counted.layer_macs - counted.attention_macs
    return counted.passes * macs / 1e9


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""The sizes that `elt bench` measures, and the networks of them."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from elt_lightning.data.base import Batch
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.looped import CompileMode
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.base import Objective
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.base import Process
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.samplers.base import Sampler
from elt_lightning.samplers.diffusion import DDPMSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule

Family = Literal["masked", "diffusion"]
Network = LoopedMaskedTransformer | LoopedDiT
Compiled = CompileMode | Literal["no"]
"""Whether and how a network is compiled."""


@dataclass(frozen=True)
class Shape:
    """A looped model, and what it is fed."""

    family: Family  # masked tokens, or diffusion of latents
    layer: dict[str, Any]  # settings of the network that decide a layer's size
    num_layers: int  # N
    loops: int  # L of training, and the largest of inference
    input_shape: tuple[int, ...] = (16, 16)  # of a sample, as the networks take it
    num_classes: int = 1000  # classes
    codebook_size: int = 1024  # V of masked models

    def build(self, num_layers: int, dtype: torch.dtype, device: torch.device, recall: bool = False) -> Network:
        """Build the network with any number of layers, and random weights: from zeros some hardware computes faster."""
        settings: dict[str, Any] = {"input_shape": self.input_shape, "num_classes": self.num_classes, **self.layer}
        settings["recall"] = recall
        with device:
            if self.family == "masked":
                network: Network = LoopedMaskedTransformer(self.codebook_size, num_layers=num_layers, **settings)
            else:
                network = LoopedDiT(num_layers=num_layers, **settings)
            for weight in network.parameters():
                nn.init.normal_(weight, std=0.02)
        return network.to(dtype)

    def module(self, network: Network, distillation: ILSD, steps: int = 2, guidance: float = 1.0) -> ELTModule:
        """Wire a network up as the configs of its family do."""
        scale = Guidance(guidance)
        if self.family == "masked":
            process: Process = MaskingProcess(self.codebook_size)
            objective: Callable[[Any], Objective] = MaskedObjective
            sampler: Callable[..., Sampler] = MaskGITSampler
        else:
            process, objective, sampler = GaussianProcess(), DiffusionObjective, DDPMSampler
        drawn = partial(sampler, steps=steps, guidance=scale)
        return ELTModule(network, process, objective, distillation, drawn, self.num_classes)

    def batch(self, batch_size: int, device: torch.device) -> Batch:
        """Draw samples as in training, and labels in turn."""
        index = torch.arange(batch_size, device=device)
        if self.family == "masked":
            x = torch.randint(self.codebook_size, (batch_size, math.prod(self.input_shape)), device=device)
        else:
            x = torch.randn(batch_size, *self.input_shape, device=device)
        return Batch(x, index % self.num_classes, index)

    @property
    def paper_steps(self) -> int:
        """Sampling steps in the paper."""
        return 24 if self.family == "masked" else 512


LATENTS = (4, 32, 32)
SHAPES = {
    "tiny": Shape("masked", {"width": 32, "num_heads": 2}, 1, 2, (4, 4), 10, 16),
    "tiny_dit": Shape("diffusion", {"width": 32, "num_heads": 2}, 1, 2, (4, 8, 8), 10),
    "small": Shape("masked", {"width": 512, "num_heads": 8}, 4, 4),
    "small_dit": Shape("diffusion", {"width": 512, "num_heads": 8}, 4, 4, LATENTS),
    "B": Shape("masked", {"scale": "B"}, 6, 2),
    "L": Shape("masked", {"scale": "L"}, 8, 3),
    "XL": Shape("masked", {"scale": "XL"}, 7, 4),
    "H": Shape("masked", {"scale": "H"}, 8, 4),
    "wide": Shape("diffusion", {"scale": "wide", "block": "film", "condition_width": 1024}, 8, 4, LATENTS),
}
"""Named sizes: B, L, XL and H with the layers and loops of Table 3; ``wide`` is Table 2's, 8N×4L against the DiT of 32
layers and 2.1B parameters; ``small`` ones keep a CPU busy with matrix products; ``tiny`` ones only show that everything
runs."""


def twin(network: Network, compile_mode: Compiled = "no") -> Network:
    """Return a network of the same weights, not copies of them, that is compiled or checkpointed by itself."""
    other = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    if compile_mode != "no":
        other.backbone.compile_loop(compile_mode, dynamic=False)
    return other


def num_bytes(network: nn.Module) -> int:
    """Return the bytes of the weights."""
    return sum(weight.nbytes for weight in network.parameters())


def num_parameters(network: nn.Module) -> int:
    """Count the weights."""
    return sum(weight.numel() for weight in network.parameters())

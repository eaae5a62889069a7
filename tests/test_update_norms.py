from functools import partial

import pytest
import torch
from torch import Tensor, nn

from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.reproduce.update_norms import update_norms
from elt_lightning.samplers.diffusion import DDIMSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.loop_schedule import LoopSchedule
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule

STEPS, LOOPS, SAMPLES = 3, 4, 5


def masked(num_layers: int) -> ELTModule:
    network = LoopedMaskedTransformer(
        codebook_size=7, input_shape=(3, 3), num_classes=3, num_layers=num_layers, width=16, num_heads=2
    )
    sampler = partial(MaskGITSampler, steps=STEPS, loop_schedule=LoopSchedule("falling"))  # which is not followed
    return ELTModule(network, MaskingProcess(7), MaskedObjective, ILSD(2), sampler, 3).eval()


def diffusion(num_layers: int) -> ELTModule:
    network = LoopedDiT((1, 4, 4), 3, num_layers, width=16, num_heads=2)
    for parameter in network.parameters():  # untrained adaLN-Zero blocks change nothing
        nn.init.normal_(parameter, std=0.2)
    sampler = partial(DDIMSampler, steps=STEPS, guidance=Guidance(2.0))
    return ELTModule(network, GaussianProcess(), DiffusionObjective, ILSD(2), sampler, 3).eval()


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("make", [masked, diffusion])
def test_norms_are_those_of_the_differences_between_exits(make: type, num_layers: int) -> None:
    torch.manual_seed(0)
    module = make(num_layers)
    passes: list[tuple[Tensor, dict[int, Tensor]]] = []
    backbone, forward = module.network.backbone, module.network.backbone.forward

    def spy(
        h: Tensor, condition: Tensor | None, loops: int, exits: tuple[int, ...], state: None
    ) -> tuple[dict[int, Tensor], Tensor]:
        states, state = forward(h, condition, loops, range(1, loops + 1), state)
        passes.append((h, states))
        return {loops: states[loops]}, state

    backbone.forward = spy
    norms = update_norms(module, SAMPLES, LOOPS, seed=0)
    assert norms.shape == (STEPS, LOOPS)
    for step, (h, states) in enumerate(passes):
        for loop in range(1, LOOPS + 1):
            update = states[loop] - (states[loop - 1] if loop > 1 else h)
            torch.testing.assert_close(norms[step, loop - 1], update.square().sum(-1).sqrt().mean())
    assert norms.min() > 0
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in backbone.modules())

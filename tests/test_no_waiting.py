"""Samplers and training steps never ask the device for a value: on the meta device, where none exist, they run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from predictions import stateless
from torch import Tensor

from elt_lightning.data.base import Batch
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.flow_matching import FlowMatchingObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.samplers.diffusion import DDIMSampler, DDPMSampler, DPMSolverSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule

NOWHERE = torch.device("meta")
CODES, CLASSES, BATCH, STEPS = 11, 5, 3, 4


def masked() -> LoopedMaskedTransformer:
    with NOWHERE:
        return LoopedMaskedTransformer(CODES, (3, 4), CLASSES, num_layers=1, width=16, num_heads=2)


def dit(block: str = "adaln_zero") -> LoopedDiT:
    with NOWHERE:
        return LoopedDiT((2, 4, 6), CLASSES, num_layers=1, width=16, num_heads=2, block=block)  # type: ignore[arg-type]


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "maskgit": lambda guidance: MaskGITSampler(MaskingProcess(CODES), CLASSES, STEPS, guidance=guidance),
    "ddpm": lambda guidance: DDPMSampler(GaussianProcess(), CLASSES, STEPS, clip=1.0, guidance=guidance),
    "ddim": lambda guidance: DDIMSampler(GaussianProcess(), CLASSES, STEPS, guidance=guidance),
    "dpm": lambda guidance: DPMSolverSampler(GaussianProcess(), CLASSES, STEPS, guidance=guidance),
}


def draw(name: str, guidance: Guidance, given: bool, predict: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    is_masked = name == "maskgit"
    network = masked() if is_masked else dit()
    process: Process = MaskingProcess(CODES) if is_masked else GaussianProcess()
    labels = torch.arange(BATCH, device=NOWHERE)
    size = (BATCH, *network.sample_shape)
    known = torch.zeros(size, dtype=torch.int64 if is_masked else torch.float32, device=NOWHERE) if given else None

    def call(x: Tensor, condition: Condition, loops: int) -> Tensor:
        prediction = network(x, condition, loops).predictions[loops]
        return process.denoised(prediction if predict is None else predict(prediction), x, condition)

    sampler = SAMPLERS[name](guidance)
    with torch.no_grad():
        return sampler.sample(
            stateless(call), network.sample_shape, Condition(labels), 2, sample_seeds(0, labels), known
        )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0, "linear"), Guidance(2.0, interval=(0.25, 0.75))])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str, guidance: Guidance, given: bool) -> None:
    sample = draw(name, guidance, given)
    assert sample.device == NOWHERE
    assert len(sample) == BATCH


@pytest.mark.parametrize("ask", [lambda x: x * float(x.sum()), lambda x: x if x.sum() > 0 else -x, lambda x: x[x > 0]])
def test_what_would_wait_is_found(ask: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        draw("ddpm", Guidance(), given=False, predict=ask)


@pytest.mark.parametrize("mode", ["ilsd", "vanilla", "deep_supervision"])
@pytest.mark.parametrize("family", ["masked", "diffusion", "flow"])
def test_training_steps(family: str, mode: str) -> None:
    network = masked() if family == "masked" else dit("film")
    parts: dict[str, tuple[Process, Any, Any]] = {
        "masked": (MaskingProcess(CODES), MaskedObjective, MaskGITSampler),
        "diffusion": (GaussianProcess(), DiffusionObjective, DDPMSampler),
        "flow": (GaussianProcess("velocity"), FlowMatchingObjective, DDPMSampler),
    }
    process, objective, sampler = parts[family]
    module = ELTModule(network, process, objective, ILSD(3, mode=mode), sampler, CLASSES)  # type: ignore[arg-type]
    index = torch.arange(BATCH, device=NOWHERE)
    kind = torch.int64 if family == "masked" else torch.float32
    x = torch.zeros(BATCH, *network.sample_shape, dtype=kind, device=NOWHERE)
    loss, _ = module.loss(Batch(x, index, index), step=7, progress=0.5)
    loss.backward()
    assert all(weight.grad is not None for name, weight in network.named_parameters() if "condition" not in name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_both_branches_of_guidance_are_one_batch(name: str) -> None:
    shape = (12,) if name == "maskgit" else (2, 4, 6)
    labels, calls = torch.tensor([0, 4, 2]), []

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        calls.append((x, condition))
        return torch.zeros(*x.shape, CODES) if name == "maskgit" else torch.zeros_like(x)

    sampler = SAMPLERS[name](Guidance(3.0))
    sampler.sample(stateless(predict), shape, Condition(labels), 2, sample_seeds(0, torch.arange(3)))
    assert len(calls) == STEPS
    for x, condition in calls:
        assert torch.equal(x[:3], x[3:])
        assert condition.labels.tolist() == [0, 4, 2, CLASSES, CLASSES, CLASSES]
        assert condition.time is None or torch.equal(condition.time[:3], condition.time[3:])

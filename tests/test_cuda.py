"""On a GPU: what the CPU computes, without waiting for the device; memory, compilation, mixed precision."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from predictions import stateless
from small_runs import train_small_squares
from torch import Tensor
from torch._dynamo.utils import counters

from elt_lightning.cli import main
from elt_lightning.data.base import Batch
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import Stream, normal, random_bits, sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.samplers.diffusion import DDIMSampler, DDPMSampler, DPMSolverSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule
from elt_lightning.training.optimiser import prefer_fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
CODES, CLASSES, BATCH = 50, 5, 8
Network = LoopedMaskedTransformer | LoopedDiT


def masked() -> LoopedMaskedTransformer:
    return LoopedMaskedTransformer(CODES, (8, 8), CLASSES, num_layers=2, width=128, num_heads=4)


def dit() -> LoopedDiT:
    return LoopedDiT((4, 16, 16), CLASSES, num_layers=2, width=128, num_heads=4)


def build(make: Callable[[], Network], device: str = "cuda") -> Network:
    """The same weights at every call."""
    network = make()
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return network.to(device)


def inputs(network: Network) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(BATCH) % (CLASSES + 1)
    if isinstance(network, LoopedDiT):
        x = torch.randn(BATCH, *network.sample_shape, generator=generator)
        return x.cuda(), Condition(labels.cuda(), torch.rand(BATCH, generator=generator).cuda())
    return torch.randint(0, CODES + 1, (BATCH, *network.sample_shape), generator=generator).cuda(), Condition(
        labels.cuda()
    )


def on_the_cpu(condition: Condition) -> Condition:
    return Condition(condition.labels.cpu(), None if condition.time is None else condition.time.cpu())


@pytest.fixture(autouse=True)
def forget_compilations() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any operation that would wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_random_numbers_are_those_of_the_cpu() -> None:
    seeds = sample_seeds(7, torch.randint(0, 2**32, (33,)))
    assert torch.equal(
        random_bits(seeds.cuda(), 12, Stream.NOISE, 1001).cpu(), random_bits(seeds, 12, Stream.NOISE, 1001)
    )
    ours, theirs = normal(seeds.cuda(), 3, Stream.NOISE, (5, 9)).cpu(), normal(seeds, 3, Stream.NOISE, (5, 9))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [masked, dit])
def test_predictions_are_those_of_the_cpu(make: Callable[[], Network]) -> None:
    network, reference = build(make), build(make, "cpu").double()
    x, condition = inputs(network)
    with torch.no_grad():
        theirs = reference(x.cpu() if x.dtype == torch.int64 else x.cpu().double(), on_the_cpu(condition), 4, (1, 2))
        for loops, ours in network(x, condition, 4, (1, 2)).predictions.items():
            error = (ours.cpu().double() - theirs[loops]).norm() / theirs[loops].norm()
            assert error < 1e-4, loops


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "maskgit": lambda: MaskGITSampler(MaskingProcess(CODES), CLASSES, 4, guidance=Guidance(2.0)),
    "ddpm": lambda: DDPMSampler(GaussianProcess(), CLASSES, 4, guidance=Guidance(2.0)),
    "ddim": lambda: DDIMSampler(GaussianProcess(), CLASSES, 4, guidance=Guidance(2.0)),
    "dpm": lambda: DPMSolverSampler(GaussianProcess(), CLASSES, 4, guidance=Guidance(2.0)),
}


def drawer(name: str, network: Network) -> Callable[[int], Tensor]:
    process: Process = MaskingProcess(CODES) if name == "maskgit" else GaussianProcess()
    index = torch.arange(BATCH, device="cuda")
    seeds, condition, sampler = sample_seeds(0, index), Condition(index % CLASSES), SAMPLERS[name]()

    @torch.no_grad()
    def draw(loops: int) -> Tensor:
        return sampler.sample(
            stateless(lambda x, c, loops: process.denoised(network(x, c, loops).predictions[loops], x, c)),
            network.sample_shape,
            condition,
            loops,
            seeds,
        )

    return draw


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_do_not_wait_for_the_device(name: str, request: pytest.FixtureRequest) -> None:
    draw = drawer(name, build(masked if name == "maskgit" else dit))
    first = draw(2)
    request.getfixturevalue("no_waiting")
    again = draw(2)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)


def test_what_would_wait_is_found(no_waiting: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device="cuda").sum().item()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [masked, dit])
def test_training_steps_do_not_wait_for_the_device(
    make: Callable[[], Network], precision: torch.dtype | None, request: pytest.FixtureRequest
) -> None:
    network = build(make).train()
    process: Process = MaskingProcess(CODES) if make is masked else GaussianProcess()
    objective, sampler = (MaskedObjective, MaskGITSampler) if make is masked else (DiffusionObjective, DDPMSampler)
    optimizer = prefer_fused(torch.optim.AdamW(network.parameters(), lr=1e-3))
    module = ELTModule(network, process, objective, ILSD(4), sampler, CLASSES)  # type: ignore[arg-type]
    index = torch.arange(BATCH, device="cuda")
    x = torch.randint(0, CODES, (BATCH, 64), device="cuda") if make is masked else torch.randn(BATCH, 4, 16, 16).cuda()

    def step(number: int) -> Tensor:
        with torch.autocast("cuda", precision, enabled=precision is not None):
            loss, _ = module.loss(Batch(x, index % CLASSES, index), number, progress=0.5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    losses = [step(0)]
    request.getfixturevalue("no_waiting")
    losses += [step(0) for _ in range(19)]  # the same noise again: what is learnt by heart shows in the loss
    torch.cuda.set_sync_debug_mode("default")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [masked, dit])
def test_compiled_loops_predict_and_learn_the_same(make: Callable[[], Network]) -> None:
    """In mixed precision; neither another loop count nor training at it compiles anything again."""
    compiled, plain = build(make), build(make)
    compiled.backbone.compile_loop()
    x, condition = inputs(plain)
    for loops in (2, 1, 5):
        gradients = []
        for network in (compiled, plain):
            network.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                sum(
                    p.float().square().mean() for p in network(x, condition, loops, (1,)).predictions.values()
                ).backward()  # type: ignore[union-attr]
            gradients.append(torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None]))
        assert len(gradients[0]) == len(gradients[1])
        assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.05
    assert counters["stats"]["unique_graphs"] == 1


def test_sampling_replays_graphs_at_every_loop_count() -> None:
    replayed = build(masked)
    replayed.backbone.compile_loop("reduce-overhead")
    ours, theirs = drawer("maskgit", replayed), drawer("maskgit", build(masked))
    for loops in (2, 1, 4, 2, 3, 4):
        same = (ours(loops) == theirs(loops)).float().mean()
        assert same > 0.9, loops  # rounding may turn a draw, and draws after it
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def kept_bytes(network: Network, loops: int) -> int:
    """What a forward pass in mixed precision leaves for the backward pass."""
    tokens, condition = torch.zeros(1, 4, dtype=torch.int64, device="cuda"), Condition(torch.zeros(1).long().cuda())
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = network(tokens, condition, loops).predictions[loops].float().square().mean()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    network.zero_grad()
    return kept


@pytest.mark.parametrize("compile_loop", [False, True])
def test_weights_are_cast_once_for_all_loops(compile_loop: bool) -> None:
    """With four tokens, activations are small beside copies of the weights: those show if each loop makes its own."""
    network = build(
        lambda: LoopedMaskedTransformer(CODES, (2, 2), CLASSES, num_layers=2, width=256, num_heads=4)
    ).train()
    if compile_loop:
        network.backbone.compile_loop()
    kept_bytes(network, 2)
    kept = {loops: kept_bytes(network, loops) for loops in (1, 4, 16)}
    copies = 2 * sum(weight.numel() for weight in network.backbone.parameters() if weight.ndim > 1)
    assert kept[1] > copies
    assert kept[4] - kept[1] < 3 * copies / 4
    assert kept[16] - kept[4] < 12 * copies / 4


def test_loops_that_are_recomputed_take_less_memory_and_give_the_same_gradients() -> None:
    results = []
    for recompute in (False, True):
        network = build(dit).train()
        network.backbone.activation_checkpointing = recompute
        x, condition = inputs(network)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network(x, condition, 8).predictions[8].square().mean().backward()
        peak = torch.cuda.max_memory_allocated() - before
        results.append((peak, torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None])))
    (peak, plain), (lower, recomputed) = results
    assert lower < 0.5 * peak
    torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compile_mode", ["false", "true"])
def test_training_and_testing_from_the_command_line(
    tmp_path: Path, latin_squares_root: Path, monkeypatch: pytest.MonkeyPatch, compile_mode: str
) -> None:
    """bf16-mixed with a fused optimiser whose gradients are clipped."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "latin_squares").symlink_to(latin_squares_root.resolve())
    config = tmp_path / "gpu.yaml"
    trainer = "trainer:\n  precision: bf16-mixed\n  accelerator: gpu\n"
    config.write_text(f"base: {QUICKSTART}\nmodel:\n  compile: {compile_mode}\n{trainer}")
    checkpoint = train_small_squares(config, tmp_path)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"].values()
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights)
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--ckpt_path", str(checkpoint), "--loops=1,4", "--num_samples=20", "--run_dir=runs/t"]) == 0
    assert (tmp_path / "runs" / "t" / "loops.json").is_file()

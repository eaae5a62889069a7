"""torch.compile: the body of one loop, whatever the loop count; names, results and memory stay as they were."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_runs import train_small_squares
from torch import Tensor
from torch._dynamo.utils import counters

from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.looped import LoopedStack
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler

ROOT = Path(__file__).parent.parent
Network = LoopedMaskedTransformer | LoopedDiT


@pytest.fixture(autouse=True)
def forget_compilations() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def masked(**settings: object) -> LoopedMaskedTransformer:
    return LoopedMaskedTransformer(13, (3, 4), 5, num_layers=2, width=16, num_heads=2, **settings)  # type: ignore[arg-type]


def dit(**settings: object) -> LoopedDiT:
    return LoopedDiT((2, 4, 6), 5, num_layers=2, width=16, num_heads=2, **settings)  # type: ignore[arg-type]


def pair(make: Callable[..., Network], **settings: object) -> tuple[Network, Network]:
    """The same random weights twice."""
    networks = make(**settings), make(**settings)
    for weight, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.nn.init.normal_(weight, std=0.3)
        other.data.copy_(weight.data)
    return networks


def inputs(network: Network, batch: int = 4) -> tuple[Tensor, Condition]:
    labels = torch.arange(batch) % 6
    if isinstance(network, LoopedDiT):
        return torch.randn(batch, *network.sample_shape), Condition(labels, torch.rand(batch))
    return torch.randint(0, 14, (batch, *network.sample_shape)), Condition(labels)


@pytest.mark.parametrize("recall", [False, True])
@pytest.mark.parametrize("make", [masked, dit])
def test_one_compilation_serves_every_loop_count(make: Callable[..., Network], recall: bool) -> None:
    compiled, plain = pair(make, recall=recall)
    names = list(compiled.state_dict())
    compiled.backbone.compile_loop(backend="eager")
    assert list(compiled.state_dict()) == names == list(plain.state_dict())
    x, condition = inputs(plain)
    with torch.no_grad():
        for loops in (2, 1, 3, 4, 8, 16):
            exits = range(1, loops)
            for ours, theirs in zip(
                *(n(x, condition, loops, exits).predictions.values() for n in (compiled, plain)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if recall:  # a carried state takes the same one
            state = plain(x, condition, 2).state
            ours, theirs = (n(x, condition, 2, state=state).predictions[2] for n in (compiled, plain))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def operations_compiled(num_layers: int, loops: int) -> int:
    torch.compiler.reset()
    counters.clear()
    network = LoopedMaskedTransformer(13, (3, 4), 5, num_layers=num_layers, width=16, num_heads=2)
    network.backbone.compile_loop(backend="eager")
    network(*inputs(network), loops)
    return counters["stats"]["calls_captured"]


def test_what_is_compiled_grows_with_layers_and_not_with_loops() -> None:
    two = operations_compiled(2, 1)
    assert operations_compiled(2, 12) == two > 0
    assert operations_compiled(4, 1) == 2 * two


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("make", [masked, dit, lambda: dit(recall=True)])
def test_gradients_are_those_without(make: Callable[..., Network], activation_checkpointing: bool) -> None:
    compiled, plain = pair(make)
    compiled.backbone.activation_checkpointing = activation_checkpointing
    compiled.backbone.compile_loop(backend="aot_eager")
    x, condition = inputs(plain)
    for loops in (3, 5):
        for network in (compiled, plain):
            network.zero_grad()
            sum(p.square().mean() for p in network.train()(x, condition, loops, (1,)).predictions.values()).backward()  # type: ignore[union-attr]
        for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None, name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_mixed_precision_casts_the_weights_once_for_all_loops() -> None:
    """As autocast's cache does without compilation: what a further loop keeps is activations alone."""
    compiled, plain = pair(masked)
    compiled.backbone.compile_loop(backend="aot_eager")
    x, condition = inputs(plain)
    weights = sum(w.numel() for w in plain.backbone.parameters() if w.ndim > 1)

    def kept(network: Network, loops: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            loss = network(x, condition, loops).predictions[loops].float().square().mean()
        size = sum(storage.nbytes() for storage in storages.values())
        network.zero_grad()
        loss.backward()
        return size

    loop = kept(plain, 2) - kept(plain, 1)
    assert kept(compiled, 16) - kept(compiled, 1) <= 15 * loop
    assert kept(compiled, 1) >= 2 * weights  # the copies in bfloat16 are there, once
    kept(compiled, 4), kept(plain, 4)
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        scale = float(theirs.grad.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.1, atol=0.05 * scale + 1e-6)


def test_samples_of_a_compiled_network() -> None:
    compiled, plain = pair(masked)
    compiled.backbone.compile_loop(backend="eager")
    sampler = MaskGITSampler(MaskingProcess(13), 5, steps=6, guidance=Guidance(2.0, interval=(0.0, 0.5)))
    labels, seeds = torch.arange(4), sample_seeds(3, torch.arange(4))

    def draw(network: Network) -> Tensor:
        with torch.no_grad():
            return sampler.sample(
                network,
                network.sample_shape,
                Condition(labels),
                [1, 2, 3, 4, 5, 6],
                seeds,
            )

    assert torch.equal(draw(compiled), draw(plain))
    assert counters["stats"]["unique_graphs"] == 2  # both branches of guidance in a batch, then one


@pytest.mark.slow
def test_compile_is_a_setting_of_training(
    tmp_path: Path, latin_squares_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "latin_squares").symlink_to(latin_squares_root.resolve())
    plain = train_small_squares(ROOT / "configs" / "quickstart.yaml", tmp_path)
    modes = []

    def compile_without_a_compiler(stack: LoopedStack, mode: str = "default") -> None:
        modes.append(mode)
        for part in (stack.prelude, stack.layers, stack.coda):
            part.compile(backend="eager")

    monkeypatch.setattr(LoopedStack, "compile_loop", compile_without_a_compiler)
    config = tmp_path / "compiled.yaml"
    config.write_text(f"base: {ROOT / 'configs' / 'quickstart.yaml'}\nmodel:\n  compile: true\n")
    (tmp_path / "runs").rename(tmp_path / "plain_runs")
    compiled = train_small_squares(config, tmp_path)
    assert modes == ["default"]
    assert counters["stats"]["unique_graphs"] >= 2  # training, and drawing samples
    weights = build_module(read_checkpoint(compiled)).state_dict()  # built for sampling, it is not compiled
    assert modes == ["default"]
    others = build_module(read_checkpoint(tmp_path / "plain_runs" / plain.relative_to(tmp_path / "runs"))).state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-4)

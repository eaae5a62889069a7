"""Mixed precision: shared weights are cast once, gradients are all there, fused optimisers can be clipped."""

from collections.abc import Callable

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.processes.conditioning import Condition
from elt_lightning.training.precision import CachedMixedPrecision, cache_weight_casts


def network() -> LoopedMaskedTransformer:
    torch.manual_seed(0)
    return LoopedMaskedTransformer(50, (4, 4), 3, num_layers=2, width=64, num_heads=2)


def run(model: LoopedMaskedTransformer, plugin: MixedPrecision, loops: int) -> Tensor:
    tokens, condition = torch.arange(32).view(2, 16), Condition(torch.tensor([0, 1]))
    with plugin.forward_context():
        return sum(p.float().square().mean() for p in model(tokens, condition, loops, [1]).predictions.values())  # type: ignore[return-value]


def kept_weights(plugin: MixedPrecision, loops: int) -> int:
    """Bytes of matrices in bfloat16 that autograd keeps: copies of weights, for activations have a batch."""
    copies: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and 32 not in tensor.shape and 34 not in tensor.shape:
            copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run(network(), plugin, loops)
    assert loss.isfinite()
    return sum(copies.values())


def test_copies_of_shared_weights_do_not_grow_with_loops() -> None:
    cached, plain = CachedMixedPrecision("bf16-mixed", "cpu"), MixedPrecision("bf16-mixed", "cpu")
    assert kept_weights(cached, 16) == kept_weights(cached, 4) > 0
    assert kept_weights(plain, 16) > 3 * kept_weights(plain, 4)


@pytest.mark.parametrize("loops", [1, 4])
def test_gradients_are_those_without_the_cache(loops: int) -> None:
    gradients = []
    for kind in (CachedMixedPrecision, MixedPrecision):
        model = network()
        run(model, kind("bf16-mixed", "cpu"), loops).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0.1, atol=2e-3)


def test_a_second_step_sees_the_weights_of_the_first() -> None:
    model, plugin = network(), CachedMixedPrecision("bf16-mixed", "cpu")
    before = run(model, plugin, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(run(model, plugin, 2), before)


@pytest.mark.parametrize(("precision", "cached"), [("bf16-mixed", True), ("32-true", False), ("bf16-true", False)])
def test_trainers_in_mixed_precision_get_it(precision: str, cached: bool) -> None:
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False)  # type: ignore[arg-type]
    cache_weight_casts(trainer)
    assert isinstance(trainer.precision_plugin, CachedMixedPrecision) == cached


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_for_fused_optimisers_too(fused: bool) -> None:
    model, plugin = network(), CachedMixedPrecision("bf16-mixed", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    run(model, plugin, 2).backward()
    norm: Callable[[], Tensor] = lambda: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore[misc]  # noqa: E731
    assert norm() > 1e-3
    plugin.clip_gradients(optimizer, clip_val=1e-3)
    assert norm() == pytest.approx(1e-3, rel=1e-3)

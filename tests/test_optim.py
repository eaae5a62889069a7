import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.training.optimiser import LearningRateSchedule, parameter_groups, state_layouts, with_schedule


def network() -> LoopedMaskedTransformer:
    return LoopedMaskedTransformer(11, (3, 3), 4, num_layers=2, width=16, num_heads=2, prelude_layers=1, coda_layers=1)


def names_in(group: dict, module: nn.Module) -> set[str]:
    places = {id(parameter): name for name, parameter in module.named_parameters()}
    return {places[id(parameter)] for parameter in group["params"]}


def test_kernels_of_linear_layers_decay_and_nothing_else() -> None:
    module = network()
    decaying, others = parameter_groups(module)
    kernels = ("attention.query_key_value", "attention.output", "mlp_in", "mlp_out")
    blocks = ("prelude.0", "layers.0", "layers.1", "coda.0")
    expected = {f"backbone.{block}.{kernel}.weight" for block in blocks for kernel in kernels} | {"head_dense.weight"}
    assert names_in(decaying, module) == expected
    assert names_in(others, module) == {name for name, _ in module.named_parameters()} - expected
    assert "weight_decay" not in decaying
    assert others["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(others["params"]) == len(list(module.parameters()))


def test_convolutions_decay_norms_embeddings_and_frozen_weights_do_not() -> None:
    module = nn.Sequential(
        nn.Conv1d(2, 3, 1),
        nn.Conv2d(2, 3, 3),
        nn.Conv3d(1, 1, 3),
        nn.GroupNorm(1, 3),
        nn.Embedding(5, 3),
        nn.Linear(3, 3),
    )
    module[5].weight.requires_grad_(False)
    decaying, others = parameter_groups(module)
    assert names_in(decaying, module) == {"0.weight", "1.weight", "2.weight"}
    assert names_in(others, module) == {"0.bias", "1.bias", "2.bias", "3.weight", "3.bias", "4.weight", "5.bias"}


def test_with_zero_gradients_one_step_shrinks_the_kernels_alone() -> None:
    module = network()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=0.1, weight_decay=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        is_kernel = parameter.ndim == 2 and "embedding" not in name
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if is_kernel else 1.0))


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (10, 100), (50, 100)])
@pytest.mark.parametrize("final_share", [0.0, 0.1])
def test_learning_rate_warms_up_linearly_then_follows_half_a_cosine(
    warmup: int, total: int, final_share: float
) -> None:
    constant = LearningRateSchedule(warmup)
    cosine = LearningRateSchedule(warmup, "cosine", final_share)
    for step in range(warmup):
        assert constant.factor(step, total) == cosine.factor(step, total) == pytest.approx((step + 1) / warmup)
    for step in range(warmup, total + 5):
        assert constant.factor(step, total) == 1.0
        # (1 + cos 2a)/2 = cos² a.
        angle = math.pi / 2 * min(1.0, (step - warmup) / (total - warmup))
        assert cosine.factor(step, total) == pytest.approx(final_share + (1 - final_share) * math.cos(angle) ** 2)
    assert cosine.factor(total, total) == pytest.approx(final_share)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_warm_up_longer_than_training_never_passes_the_peak(decay: str) -> None:
    schedule = LearningRateSchedule(1000, decay)
    factors = [schedule.factor(step, 300) for step in range(300)]
    assert factors == sorted(factors)
    assert factors[0] > 0
    assert factors[-1] == pytest.approx(0.3)


def test_a_schedule_that_goes_on_has_the_peaks_and_the_warm_up_of_now() -> None:
    def made(peak: float, warmup: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
        both: Any = with_schedule(optimizer, LearningRateSchedule(warmup), 100)
        return optimizer, both["lr_scheduler"]["scheduler"]

    first, before = made(0.5, 0)
    for _ in range(9):
        first.step()
        before.step()
    second, after = made(0.1, 40)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    assert second.param_groups[0]["lr"] == after.get_last_lr()[0] == pytest.approx(0.1 * 10 / 40)
    second.step()
    after.step()
    assert second.param_groups[0]["lr"] == pytest.approx(0.1 * 11 / 40)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("AdamW", {}), ("AdamW", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("RMSprop", {}), ("Adagrad", {})],
)
def test_what_an_optimiser_keeps_is_known_without_a_step_of_its_own(kind: str, settings: dict[str, Any]) -> None:
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(5))]
    optimizer = getattr(torch.optim, kind)(weights, lr=0.1, **settings)
    layouts = state_layouts(optimizer)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert layouts is not None
    for weight, layout in zip(weights, layouts, strict=True):
        found = {name: value.shape for name, value in optimizer.state[weight].items()}
        assert found
        assert {name: value.shape for name, value in layout.items()} == found


def test_the_scheduler_of_an_optimiser_gives_both_groups_the_same_rate() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(network()), lr=3e-4)
    schedule = LearningRateSchedule(4, "cosine")
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, 20))
    for step in range(20):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([3e-4 * schedule.factor(step, 20)] * 2)
        optimizer.step()
        scheduler.step()

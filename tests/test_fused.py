"""Optimisers take their step in one kernel where torch has one, and the user has not said otherwise."""

from typing import Any

import pytest
import torch

from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.training.optimiser import parameter_groups, prefer_fused


def network() -> LoopedMaskedTransformer:
    torch.manual_seed(0)
    return LoopedMaskedTransformer(11, (3, 3), 4, num_layers=2, width=16, num_heads=2)


def is_fused(optimizer: torch.optim.Optimizer) -> list[object]:
    return [group.get("fused") for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_left_open_it_is_fused(kind: Any) -> None:
    assert is_fused(prefer_fused(kind(parameter_groups(network()), lr=0.1))) == [True, True]


@pytest.mark.parametrize("said", [{"fused": False}, {"fused": True}, {"foreach": True}, {"foreach": False}])
def test_what_the_user_said_stays(said: dict[str, bool]) -> None:
    optimizer = prefer_fused(torch.optim.AdamW(parameter_groups(network()), **said))  # type: ignore[arg-type]
    assert is_fused(optimizer) == [said.get("fused")] * 2


def test_other_optimisers_stay_and_so_do_weights_without_a_kernel() -> None:
    assert is_fused(prefer_fused(torch.optim.RMSprop(network().parameters()))) == [None]
    nowhere = network().to("meta")
    assert is_fused(prefer_fused(torch.optim.AdamW(parameter_groups(nowhere)))) == [False, False]


def test_its_steps_are_those_of_the_formulas() -> None:
    plain, fused = network(), network()
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [
        torch.optim.AdamW(parameter_groups(plain), foreach=False, **settings),
        prefer_fused(torch.optim.AdamW(parameter_groups(fused), **settings)),
    ]
    for _ in range(5):
        for weight, other in zip(plain.parameters(), fused.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, other in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)


def test_a_training_begun_without_goes_on_without() -> None:
    model = network()
    old = torch.optim.AdamW(parameter_groups(model))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    old.step()
    new = prefer_fused(torch.optim.AdamW(parameter_groups(model)))
    new.load_state_dict(old.state_dict())
    new.step()
    assert is_fused(new) == [None, None]

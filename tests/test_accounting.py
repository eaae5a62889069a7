"""Parameters and multiply–accumulates: against torch's counter on the meta device, and against what is printed."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.commands.plan import read
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.networks.scales import SCALES
from elt_lightning.processes.conditioning import Condition
from elt_lightning.reproduce.accounting import (
    Count,
    count,
    count_row,
    count_scale,
    gflops_as_printed,
    params_as_printed,
)
from elt_lightning.reproduce.published import TABLE_1, TABLE_2, TABLE_4, Row


@pytest.fixture(autouse=True)
def work_in_the_root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(request.config.rootpath)


def counted(row: Row) -> Count:
    found = count_row(row)
    assert found is not None
    return found


def torch_macs(network: nn.Module, loops: int) -> tuple[int, int]:
    """Let torch count a pass of one sample: all multiply–accumulates, and those of the attention products."""
    shape = network.sample_shape
    is_masked = isinstance(network, LoopedMaskedTransformer)
    x = torch.zeros(1, *shape, dtype=torch.int64 if is_masked else torch.float32, device="meta")  # type: ignore[misc]
    condition = Condition(torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(x, condition, loops)
    by_operation = counter.get_flop_counts()["Global"]
    attention = sum(flops for name, flops in by_operation.items() if "bmm" in str(name) or "attention" in str(name))
    return counter.get_total_flops() // 2, attention // 2


IMAGE_TOKENS = {"codebook_size": 1024, "input_shape": (16, 16), "num_classes": 1000}
LATENTS = {"input_shape": (4, 32, 32), "num_classes": 1000}
FAMILIES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "masked": (LoopedMaskedTransformer, IMAGE_TOKENS),
    "masked video": (
        LoopedMaskedTransformer,
        {"codebook_size": 1024, "input_shape": (4, 16, 16), "num_classes": 101, "scale": "L"},
    ),
    "adaln_zero": (LoopedDiT, {**LATENTS, "block": "adaln_zero"}),
    "film": (LoopedDiT, {**LATENTS, "block": "film", "condition_width": 1024}),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_layers", "loops"), [(1, 3), (3, 2), (2, 1)])
def test_macs_are_those_that_torch_counts(family: str, scale: str, num_layers: int, loops: int) -> None:
    make, settings = FAMILIES[family]
    with torch.device("meta"):
        network = make(**{**settings, "scale": scale, "num_layers": num_layers})
    ours = count(network, loops)
    assert (ours.forward_macs, ours.attention_macs) == torch_macs(network, loops)
    assert ours.layer_macs < ours.forward_macs
    assert ours.effective_depth == num_layers * loops
    assert ours.params_total == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskgit_xl", "elt_l_8n3l", "elt_4n8l"])
def test_a_row_at_full_size_is_what_torch_and_the_module_count(name: str) -> None:
    row = next(row for row in TABLE_1 + TABLE_2 if row.name == name)
    module = read(["--config", str(row.config)])[2]
    ours = counted(row)
    assert (ours.forward_macs, ours.attention_macs) == torch_macs(module.network, row.loops)
    assert ours.sample_macs == module.macs_per_sample(row.loops)
    assert (ours.params_backbone, ours.params_total) == module.num_parameters()
    assert ours.passes == 2 * row.steps  # both branches of guidance


@pytest.mark.parametrize("row", [*TABLE_1, *TABLE_4[1:]], ids=lambda row: row.place)
def test_parameters_of_tables_1_and_4(row: Row) -> None:
    ours = counted(row)
    assert row.num_layers is not None
    width = 1152 if "XL" in row.model else 1024
    assert ours.params_backbone == row.num_layers * (12 * width**2 + 13 * width)
    assert params_as_printed(row, ours) == pytest.approx(row.params.value, rel=0.01)
    if row.name == "magvit_l":
        assert row.params.agrees(ours.params_total)
        assert not row.params.agrees(ours.params_backbone)
    else:
        assert params_as_printed(row, ours) == ours.params_backbone


@pytest.mark.parametrize("row", TABLE_2, ids=lambda row: row.place)
def test_parameters_of_table_2(row: Row) -> None:
    tolerance = 0.025 if row.params.text.endswith("B") else 0.01
    ours = counted(row)
    assert params_as_printed(row, ours) == ours.params_total
    assert ours.params_total == pytest.approx(row.params.value, rel=tolerance)
    assert row.depth is not None
    assert ours.effective_depth == row.depth.value


def test_gflops_of_tables_1_and_4() -> None:
    """They come out to the last digit, but for scale XL, whose two do not at all."""
    for row in TABLE_1 + TABLE_4[1:]:
        ours = gflops_as_printed(row, counted(row))
        assert row.gflops is not None
        assert row.gflops.agrees(ours) == ("XL" not in row.model), row.place
    assert count_row(TABLE_4[0]) is None


def test_gflops_of_a_masked_row_by_hand() -> None:
    ours = counted(TABLE_1[2])
    tokens, width, depth = 257, 1024, 24  # the class token is one of them
    assert ours.layer_macs == depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert gflops_as_printed(TABLE_1[2], ours) == 48 * depth * 12 * tokens * width**2 / 1e9


def test_a_looped_model_takes_what_its_baseline_takes() -> None:
    for scale, num_layers, loops in (("B", 6, 2), ("L", 8, 3), ("XL", 7, 4), ("H", 8, 4)):
        assert count_scale(scale, num_layers, loops).forward_macs == count_scale(scale).forward_macs


def test_another_network_is_refused() -> None:
    network = nn.Module()
    network.backbone = LoopedMaskedTransformer(7, (2, 2), 3, 1, width=8, num_heads=1).backbone
    with pytest.raises(TypeError, match="neither a masked nor a diffusion network"):
        count(network, 1)

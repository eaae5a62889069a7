import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.checkpoints.dit import from_dit_state_dict
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.embeddings import patchify, sine_positions, unpatchify
from elt_lightning.networks.looped import LoopedStack
from elt_lightning.networks.modulated_blocks import AdaptiveNormBlock, FiLMBlock
from elt_lightning.processes.conditioning import Condition

BLOCKS = ("adaln_zero", "film")


def randomised(network: nn.Module, std: float = 0.2) -> nn.Module:
    """Return every weight a random value: an untrained network's zeros would hide most mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std)
    return network


def small_network(block: str = "adaln_zero", **settings: object) -> LoopedDiT:
    arguments = {
        "input_shape": (3, 8, 12),
        "num_classes": 5,
        "num_layers": 2,
        "width": 24,
        "num_heads": 4,
        "block": block,
    }
    return randomised(LoopedDiT(**(arguments | settings)))  # type: ignore[arg-type, return-value]


def condition_of(size: int, num_classes: int = 5) -> Condition:
    return Condition(torch.randint(num_classes + 1, (size,)), torch.rand(size))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "depth", "published"), [("B", 12, 130_512_416), ("L", 24, 458_102_816), ("XL", 28, 675_129_632)]
)
def test_dit_sizes_are_exact(scale: str, depth: int, published: int) -> None:
    with torch.device("meta"):
        network = LoopedDiT((4, 32, 32), 1000, depth, scale=scale, out_channels=8)
    assert num_parameters(network) + network.positions.numel() == published  # DiT counts its fixed table


@pytest.mark.parametrize(
    ("num_layers", "published", "tolerance"),
    [(1, 69e6, 0.01), (4, 271e6, 0.01), (8, 539e6, 0.01), (16, 1.1e9, 0.025), (32, 2.1e9, 0.025)],
)
def test_table_2_sizes(num_layers: int, published: float, tolerance: float) -> None:
    with torch.device("meta"):
        network = LoopedDiT((4, 32, 32), 1000, num_layers, scale="wide", block="film", condition_width=1024)
    assert num_parameters(network) == pytest.approx(published, rel=tolerance)


def test_block_sizes_are_those_their_docstrings_give() -> None:
    width, hidden, told = 32, 96, 40
    assert num_parameters(AdaptiveNormBlock(width, 4, 4 * width, width)) == 18 * width**2 + 15 * width
    matrices = 4 * width**2 + 2 * width * hidden + 2 * hidden * told
    film = FiLMBlock(width, 4, hidden, told)
    assert sum(p.numel() for p in film.parameters() if p.ndim == 2) == matrices


# --- parity with DiT -------------------------------------------------------------------------------------------------


def random_dit_state(depth: int, width: int, classes: int, patch: int, channels: int, out: int) -> dict[str, Tensor]:
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (patch * patch * out, width),
        "final_layer.linear.bias": (patch * patch * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
            ("adaLN_modulation.1", 6 * width, width),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    return {name: torch.randn(shape) * 0.15 for name, shape in shapes.items()}


def dit_forward(
    state: dict[str, Tensor], x: Tensor, timestep: Tensor, labels: Tensor, num_heads: int, depth: int
) -> Tensor:
    """DiT in plain tensor algebra and float64, from its paper and its weights' names; no code of the package."""
    w = {name: value.double() for name, value in state.items()}
    x = x.double()
    patch = w["x_embedder.proj.weight"].shape[-1]
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    rows, columns = h.shape[2:]
    width = h.shape[1]
    h = torch.einsum("bdij->bijd", h).reshape(len(x), rows * columns, width) + w["pos_embed"]

    # DiT computes these in float32, which at times of up to 1000 shows in the fifth digit.
    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    told = (
        torch.cat([angles.cos(), angles.sin()], 1).double() @ w["t_embedder.mlp.0.weight"].T
        + w["t_embedder.mlp.0.bias"]
    )
    told = (told * torch.sigmoid(told)) @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"]
    told = told + w["y_embedder.embedding_table.weight"][labels]
    told = told * torch.sigmoid(told)

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(value: Tensor) -> Tensor:
        return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    for i in range(depth):
        six = linear(f"blocks.{i}.adaLN_modulation.1", told)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (six[..., k * width : (k + 1) * width] for k in range(6))
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale1) + shift1).split(width, -1)
        mixed = []
        for head in range(num_heads):
            part = slice(head * width // num_heads, (head + 1) * width // num_heads)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(width // num_heads)
            mixed.append(scores.softmax(-1) @ v[..., part])
        h = h + gate1 * linear(f"blocks.{i}.attn.proj", torch.cat(mixed, -1))
        hidden = gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale2) + shift2))
        h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", told)[:, None].split(width, -1)
    patches = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    picture = patches.new_zeros(len(x), patches.shape[-1] // patch**2, rows * patch, columns * patch)
    for i, j, p, q in product(range(rows), range(columns), range(patch), range(patch)):
        start = (p * patch + q) * picture.shape[1]
        picture[:, :, i * patch + p, j * patch + q] = patches[:, i * columns + j, start : start + picture.shape[1]]
    return picture


@pytest.mark.parametrize(("channels", "out"), [(4, 8), (3, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_parity_with_dit(channels: int, out: int, dtype: torch.dtype, tolerance: float) -> None:
    depth, width, num_heads, classes, patch, side = 3, 48, 4, 7, 2, 8
    state = random_dit_state(depth, width, classes, patch, channels, out)
    network = LoopedDiT(
        (channels, side, side), classes, depth, patch, width=width, num_heads=num_heads, out_channels=out
    )
    state["pos_embed"] = network.positions[None]  # the table itself is checked below
    network.load_state_dict(from_dit_state_dict(state), strict=True)
    x, labels, time = torch.randn(5, channels, side, side), torch.randint(classes + 1, (5,)), torch.rand(5)
    ours = network.to(dtype).eval()(x, Condition(labels, time), loops=1).predictions[1]
    theirs = dit_forward(state, x, time * 1000, labels, num_heads, depth)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_a_foreign_weight_is_refused() -> None:
    state = random_dit_state(1, 8, 2, 2, 3, 3) | {"blocks.0.norm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"blocks\.0\.norm\.weight"):
        from_dit_state_dict(state)


def test_training_checkpoints_and_wrapped_weights_of_dit_are_taken() -> None:
    """What DiT's train.py saves holds model, ema, opt and args; the averaged weights are the published ones."""
    state = random_dit_state(1, 8, 2, 2, 3, 3)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    other = {name: value + 1 for name, value in wrapped.items()}
    plain = from_dit_state_dict(state)
    for given in (wrapped, {"model": other, "ema": wrapped, "opt": {}}, {"model": wrapped}):
        assert all(torch.equal(value, plain[name]) for name, value in from_dit_state_dict(given).items())
    with pytest.raises(ValueError, match=r"x_embedder\.proj\.weight .* is missing: here is epoch"):
        from_dit_state_dict({"epoch": 3})


def test_sine_positions_number_by_number() -> None:
    rows, columns, width = 3, 5, 16
    table = sine_positions((rows, columns), width)
    for i, j in product(range(rows), range(columns)):
        expected = [
            wave(coordinate / 10000 ** (k / (width // 4)))
            for coordinate in (j, i)  # DiT's table has the column's share first
            for wave in (math.sin, math.cos)
            for k in range(width // 4)
        ]
        torch.testing.assert_close(table[i * columns + j], torch.tensor(expected))


def test_sine_positions_of_videos_are_distinct_and_padded() -> None:
    table = sine_positions((2, 3, 4), 20)  # three axes of three sines and three cosines, and two left over
    assert table.shape == (24, 20)
    assert (table[:, 18:] == 0).all()
    assert torch.pdist(table).min() > 1e-3


# --- patches ---------------------------------------------------------------------------------------------------------


def test_patchify_is_unfold() -> None:
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(patchify(x, (3, 2)), F.unfold(x, (3, 2), stride=(3, 2)).mT, rtol=0, atol=0)


def test_patches_of_a_video() -> None:
    x = torch.randn(2, 3, 4, 6, 8)
    patches = patchify(x, (2, 3, 4))
    assert patches.shape == (2, 2 * 2 * 2, 3 * 2 * 3 * 4)
    token = (1 * 2 + 0) * 2 + 1  # second in time, first row, second column
    torch.testing.assert_close(patches[:, token], x[:, :, 2:4, 0:3, 4:8].flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(unpatchify(patches, (2, 2, 2), (2, 3, 4)), x, rtol=0, atol=0)


# --- one pass, many exits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("prelude", "coda"), [(0, 0), (1, 2)])
def test_an_exit_equals_a_fresh_pass(block: str, prelude: int, coda: int) -> None:
    network = small_network(block, prelude_layers=prelude, coda_layers=coda).eval()
    x, condition = torch.randn(3, 3, 8, 12), condition_of(3)
    exits = network(x, condition, loops=5, exits=(1, 2, 4)).predictions
    assert sorted(exits) == [1, 2, 4, 5]
    for loops, prediction in exits.items():
        assert torch.equal(prediction, network(x, condition, loops).predictions[loops])
    assert not torch.allclose(exits[4], exits[5], atol=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_modulations_are_made_once_per_pass(block: str) -> None:
    network = small_network(block)
    calls: list[str] = []
    for name, module in network.named_modules():
        if name.endswith("modulate") or name == "condition":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    network(torch.randn(2, 3, 8, 12), condition_of(2), loops=4, exits=(1, 2))
    assert len(calls) == len(set(calls)) == (4 if block == "adaln_zero" else 3)


@pytest.mark.parametrize("block", BLOCKS)
def test_class_and_time_matter_and_samples_do_not_mix(block: str) -> None:
    network = small_network(block).eval()
    x, condition = torch.randn(2, 3, 8, 12), Condition(torch.tensor([1, 2]), torch.tensor([0.3, 0.6]))
    plain = network(x, condition, 2).predictions[2]
    for other in (
        Condition(torch.tensor([1, 3]), condition.time),
        Condition(condition.labels, torch.tensor([0.3, 0.601])),
    ):
        changed = network(x, other, 2).predictions[2]
        torch.testing.assert_close(changed[0], plain[0])
        assert (changed[1] - plain[1]).abs().max() > 1e-4


def test_an_untrained_network_predicts_zero_at_every_exit_and_can_learn() -> None:
    for block in BLOCKS:
        network = LoopedDiT((3, 8, 12), 5, 2, width=24, num_heads=4, block=block)  # type: ignore[arg-type]
        predictions, _ = network(torch.randn(2, 3, 8, 12), condition_of(2), 3, (1, 2))
        assert all((prediction == 0).all() for prediction in predictions.values())
        sum((prediction - 1).square().sum() for prediction in predictions.values()).backward()  # type: ignore[union-attr]
        assert network.head.linear.weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_film_block_against_plain_algebra() -> None:
    width, num_heads, hidden, told = 12, 3, 20, 7
    block = randomised(FiLMBlock(width, num_heads, hidden, told)).double()
    h, condition = torch.randn(2, 5, width).double(), torch.randn(2, told).double()
    p = {name: value.detach() for name, value in block.named_parameters()}

    def norm(value: Tensor) -> Tensor:
        return (value - value.mean(-1, keepdim=True)) / (value.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    qkv = (norm(h) * p["attention_norm.weight"]) @ p["attention.query_key_value.weight"].T
    qkv = (qkv + p["attention.query_key_value.bias"]).reshape(2, 5, 3, num_heads, width // num_heads)
    query = norm(qkv[:, :, 0]) * p["attention.query_norm.weight"] + p["attention.query_norm.bias"]
    key = norm(qkv[:, :, 1]) * p["attention.key_norm.weight"] + p["attention.key_norm.bias"]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / (width // num_heads) ** 0.5
    attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), qkv[:, :, 2]).reshape(2, 5, width)
    expected = h + attended @ p["attention.output.weight"].T + p["attention.output.bias"]
    units = (norm(expected) * p["mlp_norm.weight"]) @ p["mlp_in.weight"].T + p["mlp_in.bias"]
    film = (condition * condition.sigmoid()) @ p["modulate.weight"].T + p["modulate.bias"]
    units = units * units.sigmoid() * (1 + film[:, None, :hidden]) + film[:, None, hidden:]
    expected = expected + units @ p["mlp_out.weight"].T + p["mlp_out.bias"]
    torch.testing.assert_close(block(h, block.modulation(condition)), expected)  # type: ignore[operator]


def test_videos_and_learned_positions() -> None:
    network = small_network(input_shape=(3, 4, 8, 12), patch_size=(2, 4, 4), positions="learned")
    assert "positions" in dict(network.named_parameters())
    prediction = network(torch.randn(2, 3, 4, 8, 12), condition_of(2), 2).predictions[2]
    assert prediction.shape == (2, 3, 4, 8, 12)
    assert network.sample_shape == (3, 4, 8, 12)


def test_half_precision_tells_neighbouring_times_apart() -> None:
    network = small_network().bfloat16().eval()
    x, labels = torch.randn(1, 3, 8, 12).expand(2, -1, -1, -1), torch.zeros(2, dtype=torch.long)
    prediction = network(x, Condition(labels, torch.tensor([0.990, 0.992])), 2).predictions[2]
    assert prediction.dtype == torch.bfloat16
    assert prediction.isfinite().all()
    assert not torch.equal(prediction[0], prediction[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 3},
        {"patch_size": (2, 2, 2)},
        {"patch_size": 0},
        {"block": "other"},
        {"positions": "other"},
        {"num_layers": 0},
        {"num_heads": 5},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"patch_size|block|positions|num_layers|heads"):
        small_network(**settings)  # type: ignore[arg-type]


def test_a_missing_time_is_refused() -> None:
    with pytest.raises(ValueError, match="time"):
        small_network()(torch.randn(1, 3, 8, 12), Condition(torch.zeros(1, dtype=torch.long)), 1)
    with pytest.raises(ValueError, match="condition"):
        LoopedStack(lambda: FiLMBlock(8, 2, 16, 8), 1)(torch.randn(1, 3, 8))


# --- compute and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("loops", [1, 3])
def test_macs_are_half_the_counted_flops(block: str, loops: int) -> None:
    with torch.device("meta"):
        network = LoopedDiT((4, 32, 32), 10, 2, scale="S", block=block, prelude_layers=1, coda_layers=1)  # type: ignore[arg-type]
        x, condition = torch.empty(1, 4, 32, 32), Condition(torch.zeros(1, dtype=torch.long), torch.zeros(1))
        with FlopCounterMode(display=False) as counter:
            network(x, condition, loops)
    assert counter.get_total_flops() == 2 * network.macs(loops)


@pytest.mark.parametrize("block", BLOCKS)
def test_checkpointed_loops_give_equal_gradients_for_less_memory(block: str) -> None:
    network = small_network(block, prelude_layers=1, coda_layers=1).train()
    x, condition = torch.randn(4, 3, 8, 12), condition_of(4)
    calls: list[int] = []
    network.backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))

    def run(activation_checkpointing: bool) -> tuple[list[Tensor], int, int]:
        network.backbone.activation_checkpointing = activation_checkpointing
        network.zero_grad()
        calls.clear()
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predictions, _ = network(x, condition, 6, (2, 4))
        sum(prediction.square().sum() for prediction in predictions.values()).backward()  # type: ignore[union-attr]
        return [parameter.grad.clone() for parameter in network.parameters()], kept, len(calls)  # type: ignore[union-attr]

    plain, plain_bytes, plain_calls = run(activation_checkpointing=False)
    saved, saved_bytes, saved_calls = run(activation_checkpointing=True)
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    assert (plain_calls, saved_calls) == (6, 12)
    states = 6 * 4 * 24 * 24 * 4  # what a checkpoint keeps: six states of 4 samples, 24 tokens, 24 units, 4 bytes
    assert saved_bytes + states < plain_bytes / 2
    network.eval()
    assert run(activation_checkpointing=True)[2] == 6


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_the_class_table_begins_as_loud_as_it_is_told(std: float) -> None:
    torch.manual_seed(0)
    condition = LoopedDiT((1, 4, 4), 100, 1, width=64, num_heads=2, class_std=std).condition
    assert condition.classes.weight.std().item() == pytest.approx(std, rel=0.05)
    assert condition.time_in.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_checkpointing_is_a_setting_of_the_network() -> None:
    assert small_network(activation_checkpointing=True).backbone.activation_checkpointing
    assert not small_network().backbone.activation_checkpointing

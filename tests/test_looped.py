import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.networks.blocks import Block, PostNormBlock
from elt_lightning.networks.looped import LoopedStack
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.networks.scales import SCALES, layer_shape
from elt_lightning.processes.conditioning import Condition


def small_block(dropout: float = 0.0) -> PostNormBlock:
    return PostNormBlock(width=16, num_heads=4, mlp_width=24, dropout=dropout)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def small_network(**changes: object) -> LoopedMaskedTransformer:
    settings = {
        "codebook_size": 11,
        "input_shape": (3, 5),
        "num_classes": 4,
        "num_layers": 2,
        "width": 16,
        "num_heads": 4,
    }
    network = LoopedMaskedTransformer(**(settings | changes))
    randomise(network)
    return network.eval()


def reference_layer_norm(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * weight + bias


def reference_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def reference_block(block: PostNormBlock, h: Tensor) -> Tensor:
    """One BERT layer, one head at a time."""
    weights = dict(block.named_parameters())
    width, num_heads = h.shape[-1], block.attention.num_heads
    size = width // num_heads
    q, k, v = (
        h @ weights["attention.query_key_value.weight"][i * width : (i + 1) * width].T
        + weights["attention.query_key_value.bias"][i * width : (i + 1) * width]
        for i in range(3)
    )
    mixed = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.einsum("btd,bsd->bts", q[..., part], k[..., part]) / math.sqrt(size)
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed.append(torch.einsum("bts,bsd->btd", scores / scores.sum(-1, keepdim=True), v[..., part]))
    attended = torch.cat(mixed, -1) @ weights["attention.output.weight"].T + weights["attention.output.bias"]
    h = reference_layer_norm(h + attended, weights["attention_norm.weight"], weights["attention_norm.bias"])
    hidden = reference_gelu(h @ weights["mlp_in.weight"].T + weights["mlp_in.bias"])
    mlp = hidden @ weights["mlp_out.weight"].T + weights["mlp_out.bias"]
    return reference_layer_norm(h + mlp, weights["mlp_norm.weight"], weights["mlp_norm.bias"])


@pytest.mark.parametrize("seed", range(4))
def test_post_norm_block_equals_the_formulas_written_out(seed: int) -> None:
    torch.manual_seed(seed)
    block = small_block().double()
    randomise(block)
    h = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    ours, theirs = block(h), reference_block(block, h)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    leaves = [h, *block.parameters()]
    direction = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_post_norm_block_equals_torchs_own_encoder_layer(seed: int) -> None:
    torch.manual_seed(seed)
    block = small_block().double()
    randomise(block)
    theirs = nn.TransformerEncoderLayer(
        16,
        4,
        dim_feedforward=24,
        dropout=0.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        layer_norm_eps=1e-12,
        batch_first=True,
        norm_first=False,
        dtype=torch.float64,
    )
    names = {
        "self_attn.in_proj_": "attention.query_key_value.",
        "self_attn.out_proj.": "attention.output.",
        "linear1.": "mlp_in.",
        "linear2.": "mlp_out.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
    }
    ours = block.state_dict()
    theirs.load_state_dict({t + part: ours[o + part] for t, o in names.items() for part in ("weight", "bias")})
    h = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(block(h), theirs(h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [32, 96, 768])
def test_post_norm_block_has_twelve_d_squared_and_thirteen_d_parameters(width: int) -> None:
    with torch.device("meta"):
        block = PostNormBlock(width, num_heads=8, mlp_width=4 * width)
    assert sum(p.numel() for p in block.parameters()) == 12 * width**2 + 13 * width


def test_dropout_acts_in_training_alone() -> None:
    block, h = small_block(dropout=0.5), torch.randn(2, 5, 16)
    assert not torch.equal(block(h), block(h))
    block.eval()
    assert torch.equal(block(h), block(h))


@pytest.mark.parametrize(("prelude", "layers", "coda"), [(0, 2, 0), (1, 1, 0), (0, 3, 2), (2, 2, 1)])
@pytest.mark.parametrize("loops", [1, 4])
def test_looped_stack_equals_a_written_out_loop_in_values_and_gradients(
    prelude: int, layers: int, coda: int, loops: int
) -> None:
    stack = LoopedStack(small_block, layers, prelude, coda, final_norm=nn.LayerNorm(16)).double()
    randomise(stack)
    h = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    exits = sorted({1, loops - 1, loops} - {0})
    states, _ = stack(h, None, loops, exits)
    assert sorted(states) == exits
    leaves, total, expected_total = [h, *stack.parameters()], torch.zeros(()), torch.zeros(())
    for exit_loops in exits:
        state = h
        for block in stack.prelude:
            state = block(state)
        for _ in range(exit_loops):
            for block in stack.layers:
                state = block(state)
        for block in stack.coda:
            state = block(state)
        state = stack.final_norm(state)
        torch.testing.assert_close(states[exit_loops], state, rtol=0, atol=1e-12)
        direction = torch.randn_like(state)
        total, expected_total = (
            total + (states[exit_loops] * direction).sum(),
            expected_total + (state * direction).sum(),
        )
    for ours, naive in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected_total, leaves), strict=True
    ):
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loops", [2, 5])
def test_gradients_of_shared_layers_are_the_sum_over_unshared_copies(loops: int) -> None:
    shared = LoopedStack(small_block, 2).double()
    unrolled = LoopedStack(small_block, 2 * loops).double()
    randomise(shared)
    for place, block in enumerate(unrolled.layers):
        block.load_state_dict(shared.layers[place % 2].state_dict())
    h = torch.randn(3, 4, 16, dtype=torch.float64)
    direction = torch.randn_like(h)
    (shared(h, None, loops)[0][loops] * direction).sum().backward()
    (unrolled(h, None, 1)[0][1] * direction).sum().backward()
    for place, block in enumerate(shared.layers):
        copies = [dict(copy.named_parameters()) for copy in list(unrolled.layers)[place::2]]
        for name, parameter in block.named_parameters():
            expected = torch.stack([copy[name].grad for copy in copies]).sum(0)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"prelude_layers": 1, "coda_layers": 2}, {"dropout": 0.1}])
@pytest.mark.parametrize("seed", range(3))
def test_exit_r_of_a_deep_pass_equals_a_fresh_pass_of_r_loops_bit_for_bit(seed: int, settings: dict[str, int]) -> None:
    torch.manual_seed(seed)
    network = small_network(**settings)
    tokens, condition = torch.randint(0, 12, (4, 15)), Condition(torch.randint(0, 5, (4,)))
    deep = network(tokens, condition, 7, range(1, 7)).predictions
    assert sorted(deep) == list(range(1, 8))
    for loops, logits in deep.items():
        assert logits.shape == (4, 15, 11)
        assert torch.equal(logits, network(tokens, condition, loops).predictions[loops])
    assert not torch.equal(deep[1], deep[2])


@pytest.mark.parametrize(("loops", "exits"), [(0, ()), (-1, ()), (3, (4,)), (3, (0,)), (3, (1, -2))])
def test_exits_outside_the_loops_are_refused(loops: int, exits: tuple[int, ...]) -> None:
    stack = LoopedStack(small_block, 1)
    with pytest.raises(ValueError, match="loops"):
        stack(torch.randn(1, 2, 16), None, loops, exits)


def test_a_stack_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers"):
        LoopedStack(small_block, 0)


def test_repeated_exits_and_the_last_one_are_given_once() -> None:
    assert list(LoopedStack(small_block, 1)(torch.randn(1, 2, 16), None, 3, (2, 2, 3))[0]) == [2, 3]


class ConditionedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.modulations = 0
        self.scale = nn.Parameter(torch.randn(16))

    def modulation(self, condition: Tensor | None) -> Tensor:
        self.modulations += 1
        assert condition is not None
        return condition[:, None] * self.scale

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        return torch.tanh(h + modulation)


def test_modulation_is_computed_once_per_pass_and_reaches_every_loop() -> None:
    stack = LoopedStack(ConditionedBlock, 2, prelude_layers=1, coda_layers=1)
    h, condition = torch.randn(3, 4, 16), torch.randn(3, 16)
    states, _ = stack(h, condition, 5, (2, 4))
    blocks = [*stack.prelude, *stack.layers, *stack.coda]
    assert [block.modulations for block in blocks] == [1] * 4
    order = [0, *[1, 2] * 4, 3]
    for place in order:
        h = torch.tanh(h + condition[:, None] * blocks[place].scale)
    torch.testing.assert_close(states[4], h)


@pytest.mark.parametrize("seed", range(3))
def test_masked_transformer_equals_maskgits_embedding_and_head_written_out(seed: int) -> None:
    torch.manual_seed(seed)
    network = small_network().double()
    tokens, labels = torch.randint(0, 12, (3, 15)), torch.randint(0, 5, (3,))
    weights = network.state_dict()
    rows = []
    for sample in range(3):
        sequence = [weights["embedding.classes.weight"][labels[sample]]]
        sequence += [weights["embedding.tokens.weight"][token] for token in tokens[sample]]
        rows.append(torch.stack([e + weights["embedding.positions.weight"][i] for i, e in enumerate(sequence)]))
    h = reference_layer_norm(torch.stack(rows), weights["embedding.norm.weight"], weights["embedding.norm.bias"])
    for _ in range(3):
        for block in network.backbone.layers:
            h = reference_block(block, h)
    hidden = reference_gelu(h @ weights["head_dense.weight"].T + weights["head_dense.bias"])
    hidden = reference_layer_norm(hidden, weights["head_norm.weight"], weights["head_norm.bias"])
    logits = hidden @ weights["embedding.tokens.weight"][:11].T + weights["head_bias"]
    ours = network(tokens, Condition(labels), 3).predictions[3]
    torch.testing.assert_close(ours, logits[:, 1:], rtol=1e-10, atol=1e-10)


def test_masked_transformer_takes_image_and_video_grids() -> None:
    video = small_network(input_shape=(2, 3, 4))
    assert video.sample_shape == (24,)
    assert (
        video(torch.zeros(2, 24, dtype=torch.long), Condition(torch.zeros(2, dtype=torch.long)), 2)
        .predictions[2]
        .shape[1]
        == 24
    )
    with pytest.raises(RuntimeError):
        video(torch.zeros(2, 23, dtype=torch.long), Condition(torch.zeros(2, dtype=torch.long)), 2)


def test_initial_weights_are_a_truncated_normal_and_zero_biases() -> None:
    network = LoopedMaskedTransformer(500, (4, 4), 10, num_layers=1, width=128, num_heads=4)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.abs().max() <= 0.04
            if module.weight.numel() > 10_000:
                # A standard normal cut at ±2 has standard deviation 0.8796.
                assert module.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
    assert not network.head_bias.any()


def meta_network(layers: int, scale: str, **changes: object) -> LoopedMaskedTransformer:
    settings = {"codebook_size": 1024, "input_shape": (16, 16), "num_classes": 1000}
    with torch.device("meta"):
        return LoopedMaskedTransformer(**(settings | changes), num_layers=layers, scale=scale)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("scale", "layers", "millions", "published"),
    [
        ("L", 8, 100.8, 101),
        ("L", 12, 151.2, 152),
        ("XL", 7, 111.6, 111),
        ("L", 6, 75.6, 76),
        ("L", 24, 302.3, 303),
        ("XL", 28, 446.3, 446),
    ],
)
def test_named_scales_have_the_papers_parameter_counts(
    scale: str, layers: int, millions: float, published: int
) -> None:
    count = parameters(meta_network(layers, scale).backbone)
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert count / 1e6 == pytest.approx(published, rel=0.01)


def test_magvits_total_counts_embeddings_and_head() -> None:
    settings = {"input_shape": (4, 16, 16), "num_classes": 101}
    assert parameters(meta_network(24, "L", **settings)) / 1e6 == pytest.approx(305.6, abs=0.06)
    assert parameters(meta_network(6, "L", **settings)) / 1e6 == pytest.approx(78.8, abs=0.06)


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_builds_at_its_full_depth(scale: str) -> None:
    named = SCALES[scale]
    count = parameters(meta_network(named.full_depth, scale).backbone)
    assert count == named.full_depth * (12 * named.width**2 + 13 * named.width)


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"prelude_layers": 2, "coda_layers": 1}, {"input_shape": (4, 8, 8)}])
def test_macs_are_half_of_the_flops_that_torch_counts(loops: int, settings: dict[str, object]) -> None:
    network = meta_network(2, "B", **settings)
    tokens = torch.zeros(3, *network.sample_shape, dtype=torch.long, device="meta")
    condition = Condition(torch.zeros(3, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as counter:
        network(tokens, condition, loops)
    assert counter.get_total_flops() == 2 * 3 * network.macs(loops)


def test_published_compute_of_the_video_and_image_tables() -> None:
    video = meta_network(6, "L", input_shape=(4, 16, 16), num_classes=101).backbone
    assert video.macs(1024, 4) / 1e9 == pytest.approx(361, abs=0.5)
    assert 12 * video.macs(1024, 4) / 1e12 == pytest.approx(4.3, abs=0.05)
    assert 24 * video.macs(1024, 6) / 1e12 == pytest.approx(13, abs=0.05)
    image = meta_network(8, "L").backbone
    without_attention_products = image.macs(256, 3) - 24 * 2 * 256**2 * 1024
    assert without_attention_products / 1e9 == pytest.approx(77.3, abs=0.05)


@pytest.mark.parametrize(("prelude", "layers", "coda", "loops"), [(0, 8, 0, 3), (6, 5, 6, 4)])
def test_effective_depth_counts_the_blocks_that_run(prelude: int, layers: int, coda: int, loops: int) -> None:
    stack = LoopedStack(small_block, layers, prelude, coda)
    calls = count_calls(stack, lambda: stack(torch.randn(1, 2, 16), None, loops))
    assert stack.effective_depth(loops) == calls


def count_calls(module: nn.Module, run: Callable[[], object]) -> int:
    calls = []
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    handles = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def test_layer_shapes_come_from_a_scale_from_numbers_or_from_both() -> None:
    assert layer_shape("L", None, None, None) == (1024, 16, 4096)
    assert layer_shape(None, 48, 6, None) == (48, 6, 192)
    assert layer_shape(None, 48, 6, 100) == (48, 6, 100)
    assert layer_shape("XL", None, None, 512) == (1152, 16, 512)
    assert layer_shape("L", 512, 8, None) == (512, 8, 2048)
    for wrong in (("vast", None, None, None), (None, 64, None, None), (None, None, 4, None), (None, 10, 4, None)):
        with pytest.raises(ValueError, match=r"scale|width"):
            layer_shape(*wrong)

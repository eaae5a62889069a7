import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.tokenizers.vq_network import VQNetwork, VQSettings, inflate

TINY = {"filters": 8, "multipliers": (1, 2, 2), "codebook_size": 12, "code_channels": 6}


def tiny(dimensions: int, seed: int = 0, **settings: object) -> VQNetwork:
    """A network in float64 whose every weight matters."""
    torch.manual_seed(seed)
    network = VQNetwork(VQSettings(**{"dimensions": dimensions} | TINY | settings)).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "codebook" in name:
                parameter.mul_(3)
    return network


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# MAGVIT's network a second time: functions of a state dict, written from the settings of the published config.


def reference_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    channels = x.shape[1]
    count = max(group for group in range(1, 33) if 32 % group == 0 and channels % group == 0 and channels // group > 1)
    groups = x.reshape(len(x), count, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    ones = (-1, *[1] * (x.ndim - 2))
    x = groups.reshape(x.shape) * state[f"{name}.weight"].view(ones) + state[f"{name}.bias"].view(ones)
    return x / (1 + torch.exp(-x))


def reference_conv(state: dict[str, Tensor], name: str, x: Tensor, padding: str) -> Tensor:
    """A sum over the kernel's cells of shifted inputs."""
    weight = state[f"{name}.weight"]
    reach = weight.shape[-1] // 2
    size = x.shape[2:]
    for axis in range(2, x.ndim) if reach else ():
        if padding == "zeros":
            ends = torch.zeros_like(x.select(axis, 0)), torch.zeros_like(x.select(axis, 0))
        else:
            inner = 1 if padding == "reflect" else 0
            ends = x.select(axis, inner), x.select(axis, x.shape[axis] - 1 - inner)
        x = torch.cat([ends[0].unsqueeze(axis), x, ends[1].unsqueeze(axis)], axis)
    output = torch.zeros(())
    for cell in torch.cartesian_prod(*[torch.arange(weight.shape[-1])] * len(size)).tolist():
        shifted = x
        for axis, (start, length) in enumerate(zip(cell, size, strict=True), 2):
            shifted = shifted.narrow(axis, start, length)
        output = output + torch.einsum("bi...,oi->bo...", shifted, weight[(..., *cell)])
    bias = state.get(f"{name}.bias")
    return output if bias is None else output + bias.view(-1, *[1] * len(size))


def reference_blocks(state: dict[str, Tensor], name: str, x: Tensor, padding: str) -> Tensor:
    for number in (0, 1):
        block = f"{name}.{number}"
        h = reference_conv(state, f"{block}.conv1", reference_norm(state, f"{block}.norm1", x), padding)
        h = reference_conv(state, f"{block}.conv2", reference_norm(state, f"{block}.norm2", h), padding)
        changes = f"{block}.shortcut.weight" in state
        x = h + (reference_conv(state, f"{block}.shortcut", x, padding) if changes else x)
    return x


def halved(x: Tensor, axis: int) -> Tensor:
    return x.unflatten(axis, (-1, 2)).mean(axis + 1)


def reference_encoder(state: dict[str, Tensor], x: Tensor, padding: str, temporal: list[bool]) -> Tensor:
    x = reference_conv(state, "encoder.conv_in", x, padding)
    for level in range(len(temporal) + 1):
        x = reference_blocks(state, f"encoder.levels.{level}", x, padding)
        if level < len(temporal):
            x = halved(halved(x, x.ndim - 1), x.ndim - 2)
            x = halved(x, 2) if x.ndim == 5 and temporal[level] else x
    x = reference_blocks(state, "encoder.mid", x, padding)
    return reference_conv(state, "encoder.conv_out", reference_norm(state, "encoder.norm_out", x), padding)


def reference_decoder(state: dict[str, Tensor], x: Tensor, padding: str, temporal: list[bool]) -> Tensor:
    x = reference_blocks(state, "decoder.mid", reference_conv(state, "decoder.conv_in", x, padding), padding)
    for level in reversed(range(len(temporal) + 1)):
        x = reference_blocks(state, f"decoder.levels.{level}", x, padding)
        if level > 0:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = x.repeat_interleave(2, 2) if x.ndim == 5 and temporal[level - 1] else x
            x = reference_conv(state, f"decoder.upsampled.{level - 1}", x, padding)
    return reference_conv(state, "decoder.conv_out", reference_norm(state, "decoder.norm_out", x), padding)


@pytest.mark.parametrize(
    ("dimensions", "padding", "temporal_levels", "shape", "grid"),
    [
        (3, "reflect", 2, (8, 12, 8), (2, 3, 2)),
        (3, "zeros", 1, (4, 8, 12), (2, 2, 3)),
        (3, "replicate", 0, (3, 8, 8), (3, 2, 2)),
        (2, "reflect", 2, (12, 8), (3, 2)),
        (2, "zeros", 2, (4, 8), (1, 2)),
    ],
)
def test_the_network_computes_what_its_state_dict_means(
    dimensions: int, padding: str, temporal_levels: int, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    network = tiny(dimensions, padding=padding, temporal_levels=temporal_levels)
    assert network.settings.grid(shape) == grid
    state = network.state_dict()
    temporal = [level < temporal_levels for level in range(2)]
    pixels = random_pixels(2, 3, *shape)
    vectors = reference_encoder(state, pixels, padding, temporal)
    assert vectors.shape == (2, 6, *grid)
    assert vectors.std() > 0.3
    assert (network.encoder(pixels) - vectors).abs().max() < 1e-11

    flat = vectors.movedim(1, -1).flatten(1, -2)
    distances = (flat[:, :, None] - state["quantizer.codebook"]).square().sum(-1)
    codes = network.encode(pixels)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, distances.argmin(-1))
    assert len(codes.unique()) > 2

    values = state["quantizer.codebook"][codes].movedim(2, 1).reshape(2, 6, *grid)
    expected = reference_decoder(state, values, padding, temporal)
    assert expected.shape == pixels.shape
    assert (network.decode(codes, grid) - expected).abs().max() < 1e-11
    reconstruction, quantized = network(pixels)
    assert torch.equal(reconstruction, network.decode(codes, grid))
    assert torch.equal(quantized.codes, codes.flatten())
    assert torch.equal(quantized.passed_on, values)
    assert (quantized.vectors - flat.flatten(0, 1)).abs().max() < 1e-11
    assert (quantized.distances - distances.flatten(0, 1)).abs().max() < 1e-11
    assert torch.equal(quantized.chosen, state["quantizer.codebook"][quantized.codes])


def test_gradients_pass_the_quantiser_straight_through() -> None:
    quantizer = tiny(3).quantizer
    encoded = torch.randn(2, 6, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    slope = torch.randn_like(encoded)
    quantized = quantizer(encoded)
    (quantized.passed_on * slope).sum().backward()
    assert torch.equal(encoded.grad, slope)
    assert quantizer.codebook.grad is None
    quantized.chosen.sum().backward()
    assert torch.equal(quantizer.codebook.grad[:, 0], torch.bincount(quantized.codes, minlength=12).double())


def test_quantising_is_exact_whatever_the_precision_around_it() -> None:
    torch.manual_seed(0)
    quantizer = VQNetwork(VQSettings(**TINY)).quantizer
    encoded = torch.randn(2, 6, 2, 3, 3)
    expected = quantizer(encoded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(encoded)
    assert torch.equal(found.distances, expected.distances)
    assert found.passed_on.dtype == torch.float32


@pytest.mark.parametrize(
    ("dimensions", "filters", "parameters"),
    [(3, 64, 40_579_843), (3, 128, 157_811_971), (2, 64, 13_809_667), (2, 128, 53_104_387)],
)
def test_the_published_sizes(dimensions: int, filters: int, parameters: int) -> None:
    shape = (16, 128, 128)[-dimensions:]
    with torch.device("meta"):
        network = VQNetwork(VQSettings(dimensions, filters))
        vectors = network.encoder(torch.empty(2, 3, *shape))
        assert network.decoder(vectors).shape == (2, 3, *shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert vectors.shape == (2, 256, *(4, 16, 16)[-dimensions:])
    assert network.settings.downsampling == (4, 8, 8)[-dimensions:]
    assert network.settings.grid(shape) == (4, 16, 16)[-dimensions:]
    assert network.quantizer.codebook.shape == (1024, 256)
    assert {layer.num_groups for layer in network.modules() if isinstance(layer, torch.nn.GroupNorm)} == {32}


def test_where_channels_change_the_shortcut_sees_the_input_of_the_block() -> None:
    network = tiny(3)
    with_shortcut = [name for name, module in network.named_modules() if getattr(module, "shortcut", None)]
    assert with_shortcut == ["encoder.levels.1.0", "decoder.levels.0.0"]
    for name in with_shortcut:
        block = network.get_submodule(name)
        x = random_pixels(1, block.norm1.num_channels, 2, 3, 3)
        block.conv2.weight.data.zero_()
        weight = block.shortcut.weight.flatten(1)
        assert (block(x) - torch.einsum("bi...,oi->bo...", x, weight)).abs().max() < 1e-12


def test_kernels_start_with_the_variance_of_their_inputs() -> None:
    torch.manual_seed(0)
    network = VQNetwork(VQSettings(filters=16, multipliers=(1, 2), temporal_levels=1, codebook_size=64))
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            inputs = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.1)
            assert layer.weight.abs().max() < 2.3 * inputs**-0.5
            assert layer.bias is None or not layer.bias.any()
    codebook = network.quantizer.codebook
    assert codebook.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert codebook.abs().max() <= math.sqrt(3 / 64)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
def test_an_inflated_network_does_to_a_still_clip_what_the_flat_one_does_to_its_picture(padding: str) -> None:
    # Kernels that are zero but in the middle never see another frame, so no padding in time can matter.
    flat = tiny(2, padding=padding)
    deep = tiny(3, seed=1, padding=padding)
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    weights = inflate(flat.state_dict(), deep)
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())
    deep.load_state_dict(weights)
    picture = random_pixels(2, 3, 8, 12)
    clip = picture[:, :, None].expand(-1, -1, 8, -1, -1)
    vectors = flat.encoder(picture)
    assert (deep.encoder(clip) - vectors[:, :, None]).abs().max() < 1e-11
    codes = flat.encode(picture)
    assert torch.equal(deep.encode(clip), codes.repeat(1, 2))
    expected = flat.decode(codes, (2, 3))
    assert (deep.decode(deep.encode(clip), (2, 2, 3)) - expected[:, :, None]).abs().max() < 1e-11
    # and it is the middle slice alone that holds anything
    kernel = deep.encoder.conv_in.weight
    assert not kernel[:, :, [0, 2]].any()
    assert torch.equal(kernel[:, :, 1], flat.encoder.conv_in.weight)


def test_sizes_that_do_not_fit_are_refused() -> None:
    settings = VQSettings(**TINY)
    assert settings.downsampling == (4, 4, 4)
    with pytest.raises(ValueError, match="10×16×16 is not a multiple of the tokenizer's 4×4×4"):
        settings.grid((10, 16, 16))
    with pytest.raises(ValueError, match="16×16 is not a multiple"):
        settings.grid((16, 16))
    with pytest.raises(ValueError, match="grid of 1×4×4 tokens: with padding reflect"):
        settings.grid((4, 16, 16))
    assert VQSettings(**TINY, padding="zeros").grid((4, 16, 16)) == (1, 4, 4)
    with pytest.raises(ValueError, match="not a multiple"):
        tiny(3).encode(random_pixels(1, 3, 6, 8, 8))
    for wrong in ({"dimensions": 4}, {"filters": 7}, {"temporal_levels": 3}, {"multipliers": ()}, {"codebook_size": 0}):
        with pytest.raises(ValueError):  # noqa: PT011 (every value has its own message)
            VQSettings(**TINY | wrong)
    assert VQSettings(2, multipliers=(1, 1), temporal_levels=2).downsampling == (2, 2)


def test_a_small_network_runs_in_single_precision() -> None:
    torch.manual_seed(0)
    network = VQNetwork(VQSettings(filters=16, multipliers=(1, 2, 4), codebook_size=32, code_channels=16))
    pixels = torch.rand(2, 3, 8, 32, 32)
    reconstruction, quantized = network(pixels)
    assert reconstruction.shape == pixels.shape
    assert reconstruction.isfinite().all()
    assert quantized.codes.shape == (2 * 2 * 8 * 8,)
    F.mse_loss(reconstruction, pixels).backward()
    assert network.encoder.conv_in.weight.grad.abs().max() > 0

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.loading import load_tokenizer
from elt_lightning.tokenizers.tats import TATSVQGAN

STRIDES = [(2, 2, 2), (2, 2, 2), (1, 2, 2)]


def tats_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that tokens depend on, and of the codebook's other two buffers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, channels_in: int, channels_out: int, side: int) -> None:
        shapes[f"{name}.conv.weight"] = (channels_out, channels_in, side, side, side)
        shapes[f"{name}.conv.bias"] = (channels_out,)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def residual(name: str, channels: int) -> None:
        for number in (1, 2):
            norm(f"{name}.norm{number}", channels)
            convolution(f"{name}.conv{number}", channels, channels, 3)

    convolution("encoder.conv_first", 3, 32, 3)
    for number in range(3):
        narrow, wide = 32 * 2**number, 64 * 2**number
        convolution(f"encoder.conv_blocks.{number}.down", narrow, wide, 4)
        residual(f"encoder.conv_blocks.{number}.res", wide)
    norm("encoder.final_block.0", 256)
    convolution("pre_vq_conv", 256, 256, 1)
    for name in ("embeddings", "z_avg"):
        shapes[f"codebook.{name}"] = (16384, 256)
    shapes["codebook.N"] = (16384,)
    convolution("post_vq_conv", 256, 256, 1)
    norm("decoder.final_block.0", 256)
    for number, (before, after) in enumerate([(256, 256), (256, 128), (128, 64)]):
        shapes[f"decoder.conv_blocks.{number}.up.convt.weight"] = (before, after, 4, 4, 4)
        shapes[f"decoder.conv_blocks.{number}.up.convt.bias"] = (after,)
        residual(f"decoder.conv_blocks.{number}.res1", after)
        residual(f"decoder.conv_blocks.{number}.res2", after)
    convolution("decoder.conv_last", 64, 3, 3)
    return shapes


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep what comes out about as large as what goes in, and the codes of different places different."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in tats_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(2_000_000)
        elif name.endswith(("running_var", "norm1.weight", "norm2.weight", "final_block.0.weight")):
            state[name] = 1 + 0.1 * noise.abs()
        elif len(shape) == 5:
            inputs = noise[0].numel() if "convt" not in name else noise[:, 0].numel() / 8
            state[name] = noise * (1.4 / inputs) ** 0.5
        else:
            state[name] = noise if name.startswith("codebook") else 0.1 * noise
    return state


def write_checkpoint(path: Path, state: dict[str, Tensor], **more: Any) -> str:
    """Write what PyTorch Lightning 1.5 writes, besides networks that only training needs."""
    training = {
        "image_discriminator.model0.0.weight": torch.zeros(64, 3, 4, 4),
        "video_discriminator.model1.1.running_mean": torch.zeros(128),
        "perceptual_model.net.slice1.0.weight": torch.zeros(64, 3, 3, 3),
    }
    arguments = argparse.Namespace(n_codes=16384, downsample=[4, 8, 8], norm_type="batch", lr=3e-5, gpus=8)
    content = {
        "epoch": 7,
        "global_step": 2_000_000,
        "pytorch-lightning_version": "1.5.4",
        "state_dict": state | training,
        "callbacks": {"ModelCheckpoint{'monitor': 'val/recon_loss'}": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 3e-5}]}],
        "lr_schedulers": [],
        "hparams_name": "args",
        "hyper_parameters": {"args": arguments},
    }
    torch.save(content | more, path)
    return str(path)


# The network a second time: functions of a state dict.


def bordered(x: Tensor, side: int, stride: tuple[int, ...]) -> Tensor:
    """Repeat border cells, side − stride of them along each axis, the odd one before."""
    for axis, step in zip((2, 3, 4), stride, strict=True):
        before, after = (side - step + 1) // 2, (side - step) // 2
        places = torch.arange(-before, x.shape[axis] + after).clamp(0, x.shape[axis] - 1)
        x = x.index_select(axis, places)
    return x


def reference_conv(state: dict[str, Tensor], name: str, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    return F.conv3d(bordered(x, weight.shape[-1], stride), weight, state[f"{name}.conv.bias"], stride)


def reference_transposed(state: dict[str, Tensor], name: str, x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Put stride − 1 zeros between the cells, then convolve with the kernel turned round."""
    weight = state[f"{name}.convt.weight"].flip(2, 3, 4).transpose(0, 1)
    x = bordered(x, 4, stride)
    stuffed = x.new_zeros(
        *x.shape[:2], *((size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True))
    )
    stuffed[:, :, :: stride[0], :: stride[1], :: stride[2]] = x
    return F.conv3d(stuffed, weight, state[f"{name}.convt.bias"])


def reference_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    part = {key: state[f"{name}.{key}"].view(-1, 1, 1, 1) for key in ("weight", "bias", "running_mean", "running_var")}
    x = (x - part["running_mean"]) / (part["running_var"] + 1e-5).sqrt() * part["weight"] + part["bias"]
    return x * torch.sigmoid(x)


def reference_residual(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    h = x
    for number in (1, 2):
        h = reference_conv(state, f"{name}.conv{number}", reference_norm(state, f"{name}.norm{number}", h))
    return x + h


def reference_vectors(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    x = reference_conv(state, "encoder.conv_first", pixels - 0.5)
    for number, stride in enumerate(STRIDES):
        x = reference_conv(state, f"encoder.conv_blocks.{number}.down", x, stride)
        x = reference_residual(state, f"encoder.conv_blocks.{number}.res", x)
    return reference_conv(state, "pre_vq_conv", reference_norm(state, "encoder.final_block.0", x))


def reference_pixels(state: dict[str, Tensor], vectors: Tensor) -> Tensor:
    x = reference_norm(state, "decoder.final_block.0", reference_conv(state, "post_vq_conv", vectors))
    for number, stride in enumerate(STRIDES):
        x = reference_transposed(state, f"decoder.conv_blocks.{number}.up", x, stride)
        x = reference_residual(state, f"decoder.conv_blocks.{number}.res1", x)
        x = reference_residual(state, f"decoder.conv_blocks.{number}.res2", x)
    return reference_conv(state, "decoder.conv_last", x) + 0.5


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("tats") / "ucf.ckpt", state)


@pytest.fixture(scope="module")
def tats(checkpoint: str) -> TATSVQGAN:
    return TATSVQGAN(checkpoint)


@pytest.fixture(scope="module")
def exact(checkpoint: str) -> tuple[TATSVQGAN, dict[str, Tensor]]:
    tokenizer = TATSVQGAN(checkpoint).double()
    return tokenizer, tokenizer.state_dict()


def test_the_published_layout_is_read_from_a_lightning_checkpoint(tats: TATSVQGAN, state: dict[str, Tensor]) -> None:
    held = tats.state_dict()
    left_out = {"codebook.z_avg", "codebook.N"}
    assert held.keys() == state.keys() - left_out
    assert all(torch.equal(value, state[name]) for name, value in held.items())
    assert not any(parameter.requires_grad for parameter in tats.parameters())
    assert isinstance(tats, Tokenizer)
    assert (tats.codebook_size, tats.downsampling) == (16384, (4, 8, 8))
    assert tats.code_shape(16, 128, 128) == (4, 16, 16)
    with pytest.raises(ValueError, match="15×128×128 is not a multiple"):
        tats.code_shape(15, 128, 128)
    tats.train()
    assert not any(module.training for module in tats.modules())


def test_tokens_are_the_nearest_codes_row_by_row(exact: tuple[TATSVQGAN, dict[str, Tensor]], tats: TATSVQGAN) -> None:
    tokenizer, state = exact
    pixels = torch.rand(2, 3, 8, 24, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors = reference_vectors(state, pixels)
    assert vectors.shape == (2, 256, 2, 3, 4)
    assert vectors.std() > 0.3
    found = tokenizer.pre_vq_conv(tokenizer.encoder(pixels - 0.5))
    assert (found - vectors).abs().max() < 1e-10
    flat = vectors.movedim(1, -1).flatten(1, 3)
    two = torch.cdist(flat, state["codebook.embeddings"], compute_mode="donot_use_mm_for_euclid_dist").topk(
        2, largest=False
    )
    codes = tokenizer.encode(pixels)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, two.indices[..., 0])
    assert len(codes.unique()) > 10
    clear = two.values[..., 1] - two.values[..., 0] > 1e-3
    assert clear.float().mean() > 0.9
    single = tats.encode(pixels.float())
    assert torch.equal(single[clear], codes[clear])
    assert torch.equal(tats.store(pixels.float()), single.to(torch.int16))


@pytest.mark.slow
def test_tokens_become_clips_in_range(exact: tuple[TATSVQGAN, dict[str, Tensor]], tats: TATSVQGAN) -> None:
    tokenizer, state = exact
    vectors = torch.randn(2, 256, 2, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = reference_pixels(state, vectors)
    assert expected.shape == (2, 3, 8, 24, 16)
    assert expected.std() > 0.1
    found = tokenizer.decoder(tokenizer.post_vq_conv(vectors)) + 0.5
    assert (found - expected).abs().max() < 1e-10

    codes = torch.randint(0, 16384, (1, 256), generator=torch.Generator().manual_seed(3))
    grid = torch.empty(1, 256, 1, 16, 16)
    for row in range(16):
        for column in range(16):
            grid[:, :, 0, row, column] = tats.codebook.embeddings[codes[:, 16 * row + column]]
    expected = reference_pixels(tats.state_dict(), grid)
    pixels = tats.decode(codes)
    assert pixels.shape == (1, 3, 4, 128, 128)
    assert expected.min() < 0
    assert expected.max() > 1
    assert (pixels - expected.clamp(0, 1)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="300 tokens are no clip"):
        tats.decode(torch.zeros(1, 300, dtype=torch.int64))


def test_a_state_dict_alone_and_safetensors_are_read_too(
    tats: TATSVQGAN, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "tats.pt")
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "tats.safetensors")
    for name in ("tats.pt", "tats.safetensors"):
        again = TATSVQGAN(str(tmp_path / name))
        assert all(torch.equal(value, tats.state_dict()[key]) for key, value in again.state_dict().items())


def test_the_description_builds_it_again(tats: TATSVQGAN, checkpoint: str) -> None:
    description = json.loads(json.dumps(tats.description()))
    assert description["sha256"] == sha256(checkpoint)
    assert isinstance(load_tokenizer(description), TATSVQGAN)


def small_state(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    """The layout with every tensor zero, a few bytes each, after a change."""
    state = {
        name: torch.zeros((), dtype=torch.int64 if name.endswith("tracked") else torch.float32).expand(shape)
        for name, shape in tats_shapes().items()
    }
    change(state)
    return state


def refusal(path: str) -> str:
    with pytest.raises(UserError) as error:
        TATSVQGAN(path)
    message = str(error.value)
    assert "\n" not in message
    assert path in message
    return message


def test_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["encoder.conv_blocks.2.res.norm2.running_var"]
        state["cond_stage_model.weight"] = torch.zeros(3)
        state["codebook.embeddings"] = torch.zeros(()).expand(1024, 256)

    TATSVQGAN(write_checkpoint(tmp_path / "whole.ckpt", small_state(lambda state: None)))
    message = refusal(write_checkpoint(tmp_path / "other.ckpt", small_state(change)))
    assert "1 missing such as encoder.conv_blocks.2.res.norm2.running_var" in message
    assert "1 extra such as cond_stage_model.weight" in message
    assert "1 of another shape such as codebook.embeddings (1024, 256)" in message
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    assert "tensors by name" in refusal(str(tmp_path / "list.pt"))
    assert "songweige/TATS" in refusal(str(tmp_path / "nothing.ckpt"))
    for name in ("garbage.ckpt", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
        refusal(str(tmp_path / name))


class Unknown:
    """Stands for a class of a package that is not installed, or that would do harm."""

    def __init__(self) -> None:
        raise AssertionError("code of the file was run")

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the file was run")


def test_a_checkpoint_with_code_in_it_is_not_run_and_how_to_convert_it_is_said(tmp_path: Path) -> None:
    stranger = object.__new__(Unknown)
    stranger.__dict__["content"] = 1
    path = write_checkpoint(tmp_path / "old.ckpt", small_state(lambda state: None), callbacks={"x": stranger})
    message = refusal(path)
    assert f"torch.load('{path}', 'cpu', weights_only=False)['state_dict'], 'tats.pt')" in message

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from published_layouts import maskgit_vqgan_shapes, sd_vae_config, write_maskgit_vqgan, write_sd_vae
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers.base import ImageTokenizer, to_bytes
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.kl_vae import KLAutoencoder
from elt_lightning.tokenizers.loading import load_tokenizer
from elt_lightning.tokenizers.maskgit_vqgan import MaskGITVQGAN

VQGAN_CHANGES = ["encoder.down.2.block.0", "encoder.down.4.block.0", "decoder.up.1.block.0", "decoder.up.3.block.0"]
"""The residual blocks whose number of channels changes."""


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# MaskGIT's VQGAN a second time: functions of a state dict.


def reference_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    x = groups.reshape(x.shape) * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
    return x * torch.sigmoid(x)


def reference_conv(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def reference_blocks(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    for number in (0, 1):
        block = f"{name}.{number}"
        h = reference_conv(state, f"{block}.conv1", reference_norm(state, f"{block}.norm1", x))
        h = reference_conv(state, f"{block}.conv2", reference_norm(state, f"{block}.norm2", h))
        x = h + (reference_conv(state, f"{block}.nin_shortcut", h) if block in VQGAN_CHANGES else x)
    return x


def reference_encoder(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    x = reference_conv(state, "encoder.conv_in", pixels)
    for level in range(5):
        x = reference_blocks(state, f"encoder.down.{level}.block", x)
        if level < 4:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    x = reference_blocks(state, "encoder.mid", x)
    return reference_conv(state, "encoder.conv_out", reference_norm(state, "encoder.norm_out", x))


def reference_decoder(state: dict[str, Tensor], vectors: Tensor) -> Tensor:
    x = reference_blocks(state, "decoder.mid", reference_conv(state, "decoder.conv_in", vectors))
    for level in (4, 3, 2, 1, 0):
        x = reference_blocks(state, f"decoder.up.{level}.block", x)
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = reference_conv(state, f"decoder.up.{level}.upsample_conv", x)
    return reference_conv(state, "decoder.conv_out", reference_norm(state, "decoder.norm_out", x))


@pytest.fixture(scope="module")
def vqgan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_maskgit_vqgan(tmp_path_factory.mktemp("maskgit") / "maskgit-vqgan-imagenet-f16-256.bin")


@pytest.fixture(scope="module")
def vqgan(vqgan_file: Path) -> MaskGITVQGAN:
    return MaskGITVQGAN(str(vqgan_file))


@pytest.fixture(scope="module")
def exact_vqgan(vqgan_file: Path) -> MaskGITVQGAN:
    return MaskGITVQGAN(str(vqgan_file)).double()


def test_the_vqgan_holds_exactly_the_published_tensors(vqgan: MaskGITVQGAN, vqgan_file: Path) -> None:
    stored = torch.load(vqgan_file, weights_only=True)
    held = vqgan.state_dict()
    assert len(held) == len(stored) == 168
    assert sum(value.numel() for value in held.values()) == 54_515_587
    assert all(torch.equal(held[name], value) for name, value in stored.items())
    assert not any(parameter.requires_grad for parameter in vqgan.parameters())
    assert not vqgan.training
    assert isinstance(vqgan, ImageTokenizer)
    assert vqgan.code_shape(256, 256) == (16, 16)
    assert (vqgan.codebook_size, vqgan.latent_channels, vqgan.latent_scale) == (1024, None, None)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_the_vqgan_computes_what_its_state_dict_means(
    precision: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue("vqgan" if precision == torch.float32 else "exact_vqgan")
    state = tokenizer.state_dict()
    pixels = random_pixels(2, 3, 32, 64, seed=1).to(precision)
    expected = reference_encoder(state, pixels)
    assert expected.shape == (2, 256, 2, 4)
    assert (tokenizer.encoder(pixels) - expected).abs().max() <= tolerance
    vectors = torch.randn(2, 256, 3, 2, generator=torch.Generator().manual_seed(2)).to(precision)
    expected = reference_decoder(state, vectors)
    assert expected.shape == (2, 3, 48, 32)
    assert expected.std() > 0.1
    assert (tokenizer.decoder(vectors) - expected).abs().max() <= tolerance


def test_vqgan_ids_are_the_nearest_codes_row_by_row(vqgan: MaskGITVQGAN, exact_vqgan: MaskGITVQGAN) -> None:
    pixels = random_pixels(3, 3, 64, 48, seed=3)
    state = exact_vqgan.state_dict()
    vectors = reference_encoder(state, pixels.double())
    codebook = state["quantize.embedding.weight"]
    expected = torch.empty(3, 12, dtype=torch.int64)
    margin = torch.empty(3, 12, dtype=torch.float64)
    for row in range(4):
        for column in range(3):
            distances = (vectors[:, None, :, row, column] - codebook).square().sum(-1)
            nearest = distances.topk(2, largest=False)
            expected[:, row * 3 + column] = nearest.indices[:, 0]
            margin[:, row * 3 + column] = nearest.values[:, 1] - nearest.values[:, 0]
    assert len(expected.unique()) > 10
    clear = margin > 1e-3
    assert clear.float().mean() > 0.9
    ids = vqgan.encode(pixels)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[clear], expected[clear])
    assert torch.equal(exact_vqgan.encode(pixels), expected)
    assert torch.equal(vqgan.store(pixels), ids.to(torch.int16))


def test_vqgan_ids_become_a_square_picture_in_range(vqgan: MaskGITVQGAN) -> None:
    ids = torch.randint(0, 1024, (2, 9), generator=torch.Generator().manual_seed(4))
    rows = [[vqgan.quantize.embedding.weight[ids[:, 3 * row + column]] for column in range(3)] for row in range(3)]
    vectors = torch.stack([torch.stack(row, -1) for row in rows], -2)
    expected = reference_decoder(vqgan.state_dict(), vectors)
    assert expected.min() < 0
    assert expected.max() > 1
    pixels = vqgan.decode(ids)
    assert pixels.shape == (2, 3, 48, 48)
    assert (pixels - expected.clamp(0, 1)).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="12 tokens"):
        vqgan.decode(torch.zeros(1, 12, dtype=torch.int64))


def test_where_channels_change_the_shortcut_sees_the_output_of_the_block(vqgan_file: Path) -> None:
    tokenizer = MaskGITVQGAN(str(vqgan_file))
    with_shortcut = [name for name, module in tokenizer.named_modules() if getattr(module, "nin_shortcut", None)]
    assert sorted(with_shortcut) == sorted(VQGAN_CHANGES)
    for name in with_shortcut:
        block = tokenizer.get_submodule(name)
        channels_in, channels_out = block.norm1.num_channels, block.norm2.num_channels
        pixels = random_pixels(1, channels_in, 4, 4)
        assert block(pixels).abs().max() > 0.1
        # out = h + nin(h): with nin = −1 nothing is left. The usual x-path would leave h − x, or want another shape.
        block.nin_shortcut.weight.copy_(-torch.eye(channels_out)[:, :, None, None])
        assert block(pixels).abs().max() == 0


def test_the_vqgan_is_read_from_folders_and_safetensors(vqgan: MaskGITVQGAN, vqgan_file: Path, tmp_path: Path) -> None:
    pixels = random_pixels(1, 3, 32, 32)
    (tmp_path / "pytorch_model.bin").symlink_to(vqgan_file)
    from_folder = MaskGITVQGAN(str(tmp_path))
    assert torch.equal(from_folder.encode(pixels), vqgan.encode(pixels))
    assert from_folder.description()["init_args"] == {"path": str(tmp_path)}
    assert from_folder.description()["sha256"] == sha256(vqgan_file)
    (tmp_path / "pytorch_model.bin").unlink()
    halves = {name: value.half() for name, value in torch.load(vqgan_file, weights_only=True).items()}
    save_file(halves, tmp_path / "model.safetensors")
    from_halves = MaskGITVQGAN(str(tmp_path))
    assert from_halves.encoder.conv_in.weight.dtype == torch.float32
    assert (from_halves.decode(torch.arange(4)[None]) - vqgan.decode(torch.arange(4)[None])).abs().max() < 0.05


def small_file(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """Write the VQGAN's layout with every tensor zero, a few bytes each, after a change."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in maskgit_vqgan_shapes().items()}
    torch.save(change(state) or state, path)
    return str(path)


def test_another_network_than_the_vqgan_is_refused_in_one_line(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for name in ("encoder.mid.1.conv2.weight", "encoder.conv_in.weight"):
            del state[name]
        state["loss.discriminator.weight"] = torch.zeros(3)
        state["decoder.up.3.block.0.nin_shortcut.weight"] = torch.zeros(()).expand(256, 512, 1, 1)

    MaskGITVQGAN(small_file(tmp_path / "whole.bin", lambda state: None))
    with pytest.raises(UserError) as error:
        MaskGITVQGAN(small_file(tmp_path / "other.bin", change))
    message = one_line(error)
    assert "other.bin" in message
    assert "2 missing such as encoder.conv_in.weight" in message
    assert "1 extra such as loss.discriminator.weight" in message
    assert "1 of another shape such as decoder.up.3.block.0.nin_shortcut.weight (256, 512, 1, 1)" in message
    with pytest.raises(UserError) as error:
        MaskGITVQGAN(small_file(tmp_path / "nested.bin", lambda state: {"state_dict": state}))
    assert "nested.bin" in one_line(error)


@pytest.mark.parametrize("name", ["garbage.bin", "garbage.safetensors"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 cut off"])
def test_a_damaged_vqgan_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        MaskGITVQGAN(str(tmp_path / name))
    assert name in one_line(error)


def test_a_missing_vqgan_says_where_it_is_published(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.bin", tmp_path):
        with pytest.raises(UserError) as error:
            MaskGITVQGAN(str(path))
        message = one_line(error)
        assert str(path) in message
        assert "hf download fun-research/TiTok maskgit-vqgan-imagenet-f16-256.bin" in message
        assert "--tokenizer_path" in message


# Stable Diffusion's autoencoder.


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd_vae(tmp_path_factory.mktemp("sd") / "vae")


@pytest.fixture(scope="module")
def vae(vae_folder: Path) -> KLAutoencoder:
    return KLAutoencoder(str(vae_folder))


def test_the_full_autoencoder_has_the_published_tensors() -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        state = AutoencoderKL(**sd_vae_config()).state_dict()
    assert len(state) == 248
    assert sum(value.numel() for value in state.values()) == 83_653_863
    assert state["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"].shape == (256, 128, 1, 1)
    assert state["decoder.up_blocks.3.resnets.2.conv2.weight"].shape == (128, 128, 3, 3)
    assert state["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)


def test_the_small_autoencoder_of_the_tests_has_the_published_names(vae_folder: Path) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        published = AutoencoderKL(**sd_vae_config()).state_dict()
    assert load_file(vae_folder / "diffusion_pytorch_model.safetensors").keys() == published.keys()


def test_the_autoencoder_says_what_its_latents_are(vae: KLAutoencoder, vae_folder: Path, tmp_path: Path) -> None:
    assert isinstance(vae, ImageTokenizer)
    assert (vae.downsampling, vae.latent_channels, vae.latent_scale, vae.codebook_size) == (8, 4, 0.18215, None)
    assert vae.code_shape(256, 256) == (4, 32, 32)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert not any(module.training for module in vae.modules())
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    three_levels = KLAutoencoder(str(write_sd_vae(tmp_path, channels=(32, 32, 64))), scale=0.13)
    assert (three_levels.downsampling, three_levels.latent_scale) == (4, 0.13)
    assert three_levels.encode(random_pixels(1, 3, 16, 24)).shape == (1, *three_levels.code_shape(16, 24))


@pytest.mark.parametrize("scale", [0.18215, 1.5])
def test_latents_and_moments_follow_the_posterior(vae_folder: Path, scale: float) -> None:
    tokenizer = KLAutoencoder(str(vae_folder), scale).double()
    pixels = random_pixels(2, 3, 32, 48, seed=5)
    moments = tokenizer.vae.quant_conv(tokenizer.vae.encoder(pixels.double() * 2 - 1))
    mean, log_variance = moments[:, :4], moments[:, 4:].clamp(-30, 20)
    assert mean.std() > 0.5
    assert log_variance.std() > 0.5
    assert (tokenizer.encode(pixels) - scale * mean).abs().max() < 1e-6
    stored = tokenizer.store(pixels)
    assert stored.dtype == torch.float16
    assert stored.shape == (2, 8, 4, 6)
    expected = torch.cat([mean, log_variance.exp().sqrt()], 1)
    assert torch.allclose(stored.double(), expected, rtol=2**-10, atol=2**-20)
    single = KLAutoencoder(str(vae_folder), scale)
    assert (single.encode(pixels) - scale * mean).abs().max() < 1e-4


@pytest.mark.parametrize("log_variance", [-1000.0, 1000.0])
def test_stored_deviations_fit_into_float16(vae_folder: Path, log_variance: float) -> None:
    tokenizer = KLAutoencoder(str(vae_folder))
    tokenizer.vae.quant_conv.weight.zero_()
    tokenizer.vae.quant_conv.bias.fill_(log_variance)
    deviations = tokenizer.store(random_pixels(1, 3, 16, 16))[:, 4:]
    assert deviations.isfinite().all()
    assert (deviations > 0).all()


def test_decoding_undoes_the_scale_and_gives_the_usual_bytes(vae_folder: Path) -> None:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    tokenizer = KLAutoencoder(str(vae_folder), scale=0.5)
    output = tokenizer.vae.decode(latents * 2).sample
    pixels = tokenizer.decode(latents)
    assert pixels.shape == (4, 3, 64, 64)
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert torch.allclose(pixels, ((output + 1) / 2).clamp(0, 1))
    usual = torch.clamp(127.5 * output + 128, 0, 255).to(torch.uint8)
    difference = (to_bytes(pixels).int() - usual.int()).abs()
    exact = 127.5 * output.double() + 128
    assert (difference[(exact - exact.round()).abs() > 1e-4] == 0).all()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() > 0.999


def test_float16_latents_from_disk_and_a_cast_autoencoder_work(vae: KLAutoencoder, vae_folder: Path) -> None:
    pixels = random_pixels(1, 3, 16, 16)
    latents = vae.encode(pixels)
    assert (vae.decode(latents.half()) - vae.decode(latents)).abs().max() < 0.02
    cast = KLAutoencoder(str(vae_folder)).to(torch.bfloat16)
    assert cast.encode(pixels).dtype == torch.bfloat16
    assert (cast.decode(latents).float() - vae.decode(latents)).abs().max() < 0.3


def test_old_names_pipelines_and_both_formats_give_the_same_autoencoder(vae: KLAutoencoder, tmp_path: Path) -> None:
    pixels = random_pixels(1, 3, 16, 16)
    expected = vae.store(pixels)
    written = {
        "old": write_sd_vae(tmp_path / "old", old_names=True),
        "old_bin": write_sd_vae(tmp_path / "old_bin", old_names=True, safetensors=False),
        "bin": write_sd_vae(tmp_path / "bin", safetensors=False),
        "pipeline": write_sd_vae(tmp_path / "pipeline" / "vae").parent,
    }
    old = load_file(tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    assert not any("to_out" in name for name in old)
    for name, folder in written.items():
        tokenizer = KLAutoencoder(str(folder))
        assert torch.equal(tokenizer.store(pixels), expected), name
        assert torch.equal(tokenizer.decode(vae.encode(pixels)), vae.decode(vae.encode(pixels))), name


def test_a_name_on_hugging_face_is_fetched_and_described_by_its_content(
    vae: KLAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--some-vae"
    snapshot = write_sd_vae(cached / "snapshots" / "0123abc", safetensors=False)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    tokenizer = KLAutoencoder("someone/some-vae")
    pixels = random_pixels(1, 3, 16, 16)
    assert torch.equal(tokenizer.encode(pixels), vae.encode(pixels))
    description = tokenizer.description()
    assert description["init_args"] == {"path": "someone/some-vae", "scale": 0.18215}
    assert description["sha256"] == sha256(snapshot / "diffusion_pytorch_model.bin")
    for name in ("someone/other-vae", "/no/such/folder", "no-such-folder"):
        with pytest.raises(UserError) as error:
            KLAutoencoder(name)
        assert f"no folder {name}" in one_line(error)
        assert "--tokenizer_path" in one_line(error)


def test_only_the_autoencoder_is_fetched_and_safetensors_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="someone/pipeline on Hugging Face has no"):
        KLAutoencoder("someone/pipeline")
    write_sd_vae(tmp_path / "vae")
    KLAutoencoder("someone/pipeline")
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert asked[0] == asked[2] == ("someone/pipeline", [*files, *(f"vae/{file}" for file in files)])
    assert len(asked) == 3
    assert "vae/diffusion_pytorch_model.bin" in asked[1][1]


def test_folders_of_something_else_are_refused_in_one_line(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import diffusers  # noqa: F401  # before its logger is changed: it sets it up when it is imported

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)

    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            KLAutoencoder(str(folder))
        assert str(folder) in one_line(error)
        return one_line(error)

    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    config = tmp_path / "config.json"
    assert "config.json" in refused(tmp_path)
    weights.write_bytes((vae_folder / weights.name).read_bytes())
    assert "config.json" in refused(tmp_path)
    settings = json.loads((vae_folder / "config.json").read_text())
    config.write_text(json.dumps(settings | {"_class_name": "UNet2DConditionModel"}))
    assert "UNet2DConditionModel, not an AutoencoderKL" in refused(tmp_path)
    config.write_text("no json")
    assert "AutoencoderKL" in refused(tmp_path)
    config.write_text(json.dumps(settings | {"latent_channels": 8}))
    assert "7 of another shape such as decoder.conv_in.weight)" in refused(tmp_path)
    config.write_text(json.dumps(settings))
    state = load_file(weights)
    state["extra"] = state.pop("quant_conv.weight")
    save_file(state, weights)
    assert "1 missing such as quant_conv.weight, 1 extra such as extra" in refused(tmp_path)
    weights.write_bytes(b"cut off")
    assert "AutoencoderKL" in refused(tmp_path)
    assert not caplog.records  # nothing but the one line


def test_without_diffusers_the_extra_is_named(vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'elt-lightning\[vae\]'"):
        KLAutoencoder(str(vae_folder))


# What all of them share.


def test_descriptions_build_the_tokenizer_again_and_refuse_another(vae_folder: Path, tmp_path: Path) -> None:
    again = load_tokenizer(KLAutoencoder(str(vae_folder), scale=0.3).description())
    assert isinstance(again, KLAutoencoder)
    assert (again.path, again.latent_scale) == (str(vae_folder), 0.3)
    vqgan = MaskGITVQGAN(small_file(tmp_path / "vqgan.bin", lambda state: None))
    content = vqgan.description()
    assert isinstance(load_tokenizer(content), MaskGITVQGAN)

    (tmp_path / "vqgan.bin").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file .*--tokenizer_path"):
        load_tokenizer(content)
    assert isinstance(load_tokenizer(content, str(tmp_path)), MaskGITVQGAN)
    (tmp_path / "other.bin").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"other\.bin is not the tokenizer that .* were made with .*sha256"):
        load_tokenizer(content, str(tmp_path / "other.bin"))
    other = write_sd_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"/other is not the tokenizer that .* were made with .*sha256"):
        load_tokenizer(again.description(), str(other))
    with pytest.raises(UserError, match="PixelScaling has no file"):
        load_tokenizer(PixelScaling().description(), "nothing.bin")


def test_scaled_pixels_can_be_kept_on_disk() -> None:
    tokenizer = PixelScaling()
    assert isinstance(tokenizer, ImageTokenizer)
    assert tokenizer.code_shape(64, 32) == (3, 64, 32)
    assert (tokenizer.downsampling, tokenizer.latent_scale, tokenizer.codebook_size) == (1, None, None)
    pixels = torch.arange(256).float().div(255).expand(1, 3, 4, 256)
    stored = tokenizer.store(pixels)
    assert stored.dtype == torch.float16
    assert torch.equal(to_bytes(tokenizer.decode(stored.float())), to_bytes(pixels))

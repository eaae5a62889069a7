"""Randomly initialised files in the layouts of published ones: same names, same shapes."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
"""What early files call the parts of an autoencoder's attention."""


def write_maskgit_vqgan(path: Path, seed: int = 0) -> Path:
    """Write a state dict in the layout of maskgit-vqgan-imagenet-f16-256.bin (218 MB); .safetensors works too."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: random_weight(name, shape, generator) for name, shape in maskgit_vqgan_shapes().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Keep what comes out about as large as what goes in, and the codes of different places different."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    return noise / noise[0].numel() ** 0.5 if len(shape) == 4 else noise / 2


def maskgit_vqgan_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the 168 tensors."""
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (1024, 256)}

    def convolution(name: str, channels_in: int, channels_out: int, side: int = 3, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (channels_out, channels_in, side, side)
        if bias:
            shapes[f"{name}.bias"] = (channels_out,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def block(name: str, channels_in: int, channels_out: int) -> None:
        norm(f"{name}.norm1", channels_in)
        convolution(f"{name}.conv1", channels_in, channels_out, bias=False)
        norm(f"{name}.norm2", channels_out)
        convolution(f"{name}.conv2", channels_out, channels_out, bias=False)
        if channels_in != channels_out:
            convolution(f"{name}.nin_shortcut", channels_out, channels_out, side=1, bias=False)

    convolution("encoder.conv_in", 3, 128, bias=False)
    for level, (before, after) in enumerate([(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]):
        block(f"encoder.down.{level}.block.0", before, after)
        block(f"encoder.down.{level}.block.1", after, after)
    convolution("encoder.conv_out", 512, 256, side=1)
    convolution("decoder.conv_in", 256, 512)
    for part, channels in (("encoder", 512), ("decoder", 128)):
        block(f"{part}.mid.0", 512, 512)
        block(f"{part}.mid.1", 512, 512)
        norm(f"{part}.norm_out", channels)
    for level, (before, after) in enumerate([(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]):
        block(f"decoder.up.{level}.block.0", before, after)
        block(f"decoder.up.{level}.block.1", after, after)
        if level > 0:
            convolution(f"decoder.up.{level}.upsample_conv", after, after)
    convolution("decoder.conv_out", 128, 3)
    return shapes


def sd_vae_config(channels: tuple[int, ...] = (128, 256, 512, 512)) -> dict[str, object]:
    """Settings of Stable Diffusion's autoencoder for diffusers; its own channels unless others are given."""
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 256,
    }


def write_sd_vae(
    folder: Path,
    seed: int = 0,
    channels: tuple[int, ...] = (32, 64, 96, 96),
    safetensors: bool = True,
    old_names: bool = False,
) -> Path:
    """Write config.json and weights in the layout of stabilityai/sd-vae-ft-mse, narrower unless ``channels`` says so.

    Args:
        folder: made if needed.
        seed: of the weights.
        channels: of the levels, full size first; multiples of 32.
        safetensors: False writes what ``torch.save`` gives instead.
        old_names: call the attention's parts as early files do.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(**sd_vae_config(channels))
        # untrained, these give about the same Gaussian everywhere and pixels that are all grey
        torch.nn.init.normal_(vae.quant_conv.weight, std=1.5)
        torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.1)
    vae.save_pretrained(folder)
    written = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(written)
    if old_names:
        for new, old in OLD_NAMES.items():
            state = {name.replace(new, old): value for name, value in state.items()}
    if safetensors:
        save_file(state, written)
    else:
        written.unlink()
        torch.save(state, written.with_suffix(".bin"))
    return folder

"""Stable Diffusion's autoencoder: the latents that diffusion models of ImageNet are trained on."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elt_lightning.errors import UserError, first_line
from elt_lightning.tokenizers.base import ImageTokenizer

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class KLAutoencoder(ImageTokenizer):
    """An ``AutoencoderKL`` of diffusers; the published ones give 4 channels for every 8×8 pixels.

    Works in float32; ``.to(dtype)`` changes that. Its parameters cannot be trained. Needs the extra ``vae``.
    Letters: B batch, C channels of latents, H W height and width in pixels, R downsampling.

    Args:
        path: a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors`` or ``.bin``, a folder of a
            pipeline that has such a folder ``vae``, or the name of either on Hugging Face, as
            ``stabilityai/sd-vae-ft-mse``.
        scale: what latents are multiplied by, so that they are about as large as the noise that diffusion adds. 0.18215
            is the number of Stable Diffusion 1 and of DiT.

    Raises:
        UserError: diffusers is not installed, there is no such folder or name, or it holds something else.
    """

    latent_channels: int
    latent_scale: float

    def __init__(self, path: str, scale: float = 0.18215) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ModuleNotFoundError as error:
            raise UserError("latents of an autoencoder need diffusers: pip install 'elt-lightning[vae]'") from error
        self.path, self.latent_scale = path, scale
        self.file = weights_file(path)
        folder = self.file.parent
        try:
            kind = json.loads((folder / "config.json").read_text()).get("_class_name")
            if kind != "AutoencoderKL":
                raise UserError(f"{folder} holds the model {kind}, not an AutoencoderKL: give the folder of one")
            with only_errors_of("diffusers"):
                self.vae, report = AutoencoderKL.from_pretrained(
                    folder,
                    use_safetensors=self.file.suffix == ".safetensors",
                    low_cpu_mem_usage=False,  # the other way needs one more package
                    ignore_mismatched_sizes=True,  # refused below, as are tensors that diffusers would invent
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} cannot be read as an AutoencoderKL: {first_line(error)}") from error
        wrong = {
            "missing": report["missing_keys"],
            "extra": report["unexpected_keys"],
            "of another shape": [name for name, *_ in report["mismatched_keys"]],
        }
        if any(wrong.values()):
            counts = ", ".join(f"{len(names)} {kind} such as {min(names)}" for kind, names in wrong.items() if names)
            raise UserError(f"{self.file} does not fit the config.json beside it (tensors: {counts}): fetch both anew")
        self.float().requires_grad_(False).eval()
        self.downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = self.vae.config.latent_channels

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) float in [0, 1] to ``scale`` · mean of the encoder's Gaussian, (B, C, H/R, W/R)."""
        return self.latent_scale * self.gaussian(pixels).mean

    def store(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [0, 1] to (B, 2·C, H/R, W/R) float16: means, then standard deviations, not scaled.

        The standard deviations lie in [e⁻¹⁵, e¹⁰], within what float16 can hold.
        """
        gaussian = self.gaussian(pixels)
        return torch.cat([gaussian.mean, gaussian.std], 1).half()

    def gaussian(self, pixels: Tensor) -> Any:
        """Return diffusers' Gaussian of latents, ``mean`` and ``std`` not scaled, for pixels (B, 3, H, W) in [0, 1]."""
        return self.vae.encode((2 * pixels - 1).to(self.vae.dtype)).latent_dist

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (B, C, rows, columns), scaled as by :meth:`encode`, to (B, 3, R·rows, R·columns) in [0, 1].

        From the network's x in [−1, 1] :func:`~elt_lightning.tokenizers.base.to_bytes` makes the usual bytes,
        clamp(127.5·x + 128, 0, 255) truncated.
        """
        pixels = self.vae.decode(codes.to(self.vae.dtype) / self.latent_scale).sample
        return ((pixels + 1) / 2).clamp(0, 1)

    def init_args(self) -> dict[str, Any]:  # noqa: D102
        return super().init_args() | {"scale": self.latent_scale}


def weights_file(path: str) -> Path:
    """Find an autoencoder's weights in a folder, or fetch them by a name on Hugging Face; config.json lies beside them.

    Raises:
        UserError: neither gives any.
    """
    if Path(path).is_dir():
        found = weights_in(Path(path))
        if found is None:
            raise UserError(f"{path} has no config.json beside a {' or '.join(WEIGHTS)}, nor has its folder vae")
        return found
    from huggingface_hub import snapshot_download

    try:
        for name in WEIGHTS:  # many publish both: the second is fetched only where the first is not
            wanted = [f"{place}{file}" for place in ("", "vae/") for file in ("config.json", name)]
            found = weights_in(Path(snapshot_download(path, allow_patterns=wanted)))
            if found is not None:
                return found
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no folder {path}, and nothing of that name could be fetched from Hugging Face "
            f"({first_line(error)}): give a folder or a name such as stabilityai/sd-vae-ft-mse; "
            "`elt sample` takes --tokenizer_path"
        ) from error
    raise UserError(f"{path} on Hugging Face has no config.json beside a {' or '.join(WEIGHTS)}, nor has its vae")


def weights_in(folder: Path) -> Path | None:
    """Find the weights in an autoencoder's folder, or in the folder ``vae`` of a pipeline's."""
    files = (folder / place / name for place in (".", "vae") for name in WEIGHTS)
    return next((file for file in files if file.is_file() and file.with_name("config.json").is_file()), None)


@contextmanager
def only_errors_of(library: str) -> Iterator[None]:
    """Silence a library's warnings, which repeat over many lines what is then raised in one."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""Pixels as continuous values: what a diffusion model without an autoencoder is trained on."""

from torch import Tensor

from elt_lightning.tokenizers.base import ImageTokenizer


class PixelScaling(ImageTokenizer):
    """Move pixels from [0, 1] to [−1, 1], where data are about as large as the noise that diffusion adds; and back.

    Pixels may have any number of channels; only :meth:`code_shape` takes them to be three, colours.
    """

    downsampling = 1
    latent_channels = 3

    def encode(self, pixels: Tensor) -> Tensor:
        """Scale (B, C, H, W) float in [0, 1] to the same shape in [−1, 1]."""
        return 2 * pixels - 1

    def decode(self, codes: Tensor) -> Tensor:
        """Scale (B, C, H, W) float back to [0, 1]; a sample's values beyond ±1 are cut off."""
        return ((codes + 1) / 2).clamp(0, 1)

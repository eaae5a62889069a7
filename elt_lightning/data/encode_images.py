"""Encoding pictures."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elt_lightning.data.crops import CROP, Crops, Request, crop_all
from elt_lightning.data.encode import Encoding
from elt_lightning.errors import UserError
from elt_lightning.tokenizers.base import ImageTokenizer


@dataclass(frozen=True)
class ImageEncoding(Encoding):
    """Pictures, to tokens or latents. The other attributes are those of :class:`Encoding`."""

    tokenizer: ImageTokenizer
    crop: str = CROP  # `CROP` or `UPRIGHT_CROP`

    thing, unit = "picture", "images/s"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.tokenizer.downsampling:
            raise UserError(
                f"--size {self.size} is not a multiple of {self.tokenizer.downsampling}, the tokenizer's step"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The token grid (rows, columns), or the latents' (channels, rows, columns)."""
        return self.tokenizer.code_shape(self.size, self.size)

    @property
    def stored_shape(self) -> tuple[int, ...]:  # noqa: D102
        shape = self.input_shape
        if self.tokenizer.latent_channels is None:
            return (math.prod(shape),)
        return shape if self.latent_scale is None else (2 * shape[0], *shape[1:])

    @property
    def latent_scale(self) -> float | None:  # noqa: D102
        return self.tokenizer.latent_scale

    def read(self, requests: Iterable[Request], num_workers: int) -> Iterator[Crops]:  # noqa: D102
        return crop_all(requests, self.size, num_workers, self.crop)

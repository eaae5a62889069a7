"""The Latin squares as continuous images: the same pictures and the same exact scores, for diffusion."""

import torch
from torch import Tensor

from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule
from elt_lightning.metrics.handwriting import SIDE, Handwriting, load_handwriting
from elt_lightning.tokenizers.base import Tokenizer, to_bytes
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.patch_vq import with_lines


class SquarePixels(PixelScaling):
    """Pixels of Latin squares, which people are shown with a line around each cell."""

    def present(self, pixels: Tensor) -> Tensor:
        """Draw a line around each cell: (B, 1, 40, 40) float in [0, 1] to (B, 1, 46, 46) uint8."""
        return with_lines(to_bytes(pixels), SIDE)


class LatinSquareImagesDataModule(LatinSquaresDataModule):
    """Latin squares of handwritten digits as 1×40×40 images in [−1, 1]; patches of 8×8 are a token for each cell.

    Nothing is quantised. Metrics and their references are those of the tokens, so that both families can be compared.

    Args:
        root: folder of the cached digit network; it may be the tokens' own.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_train: pictures to train on, 6.4 kB each in memory.
        num_val: pictures of held-out handwriting, the reference of the metrics.
        writings_per_digit: how many of the training writings of each digit are used, the first ones; None for all, some
            143. With a few, what has to be learnt is the squares rather than the pen, as with the tokens' few codes.
        num_workers: loader processes; the data is in memory, so 0 is fastest.
        seed: of the order of training samples; what the pictures are does not depend on it.
    """

    def __init__(
        self,
        root: str = "data/latin_squares",
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_train: int = 20_000,
        num_val: int = 2_000,
        writings_per_digit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, micro_batch_size, num_train, num_val, num_workers=num_workers, seed=seed)
        if writings_per_digit is not None and writings_per_digit < 1:
            raise ValueError(f"writings_per_digit must be at least 1, not {writings_per_digit}")
        self.input_shape = (1, self.order * SIDE, self.order * SIDE)
        self.codebook_size = None
        self.writings_per_digit = writings_per_digit

    def prepare_data(self) -> None:
        """Train the digit network, once."""
        self.load_digit_network()

    def load_tokenizer(self) -> Tokenizer:
        """Scale pixels, without a file."""
        return SquarePixels()

    def load_writings(self, val: bool) -> Handwriting:
        """Load the handwriting of one side of the split; all of the held-out side."""
        writings = load_handwriting(val)
        if val or self.writings_per_digit is None:
            return writings
        kept = torch.cat([(writings.labels == digit).nonzero()[: self.writings_per_digit, 0] for digit in range(10)])
        return Handwriting(writings.images[kept], writings.labels[kept])

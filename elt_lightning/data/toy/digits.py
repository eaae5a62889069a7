"""Single handwritten digits: the smallest real data there is, for tests and first steps."""

from pathlib import Path

from elt_lightning.data.base import IndexedDataModule, TensorBatches
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.digits import RecognisedShare, load_digit_network
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.handwriting import LEVELS, SIDE, load_handwriting
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.pixels import PixelTokenizer


class DigitsDataModule(IndexedDataModule):
    """8×8 digits as 64 tokens, one of 17 grey levels each; the label is the digit.

    Args:
        root: folder where the digit network is cached.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes; the data is in memory, so 0 is fastest.
        seed: of the order of training samples.
    """

    num_classes = 10
    input_shape: tuple[int, ...] = (SIDE, SIDE)
    codebook_size: int | None = LEVELS
    primary_metric = "recognised"
    higher_is_better = True

    def __init__(
        self,
        root: str = "data/digits",
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        self.root = Path(root)

    def prepare_data(self) -> None:
        """Train the digit network, once."""
        load_digit_network(self.root)

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        return PixelTokenizer(LEVELS, (SIDE, SIDE))

    def training_set(self) -> TensorBatches:  # noqa: D102
        return self._encode(val=False)

    def val_set(self) -> TensorBatches:  # noqa: D102
        return self._encode(val=True)

    def _encode(self, val: bool) -> TensorBatches:
        handwriting = load_handwriting(val)
        return TensorBatches(self.tokenizer.encode(handwriting.images), handwriting.labels)

    def build_metrics(self) -> list[SampleMetric]:
        """Build ``recognised``, the share read as the asked digit, and ``fd_digits`` to held-out handwriting."""
        network = load_digit_network(self.root)
        distance = FrechetDistance("fd_digits", network, "digit_network")
        distance.set_reference([load_handwriting(val=True).images])
        return [RecognisedShare(network), distance]


class DigitImagesDataModule(DigitsDataModule):
    """The same digits as continuous 1×8×8 images in [−1, 1], for diffusion; the same settings, metrics, references."""

    input_shape = (1, SIDE, SIDE)
    codebook_size = None

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        return PixelScaling()

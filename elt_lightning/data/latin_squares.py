"""Latin squares written by hand: pictures that take a network of some depth to get right, without a download.

A 40×40 picture shows a 5×5 Latin square (each of the digits 1–5 once in every row and column), every cell a real
handwritten digit. The label is the digit in the centre. Whether a sample is right can be read off exactly.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor

from elt_lightning.data.base import IndexedDataModule, TensorBatches
from elt_lightning.data.handwriting import SIDE, Handwriting, load_handwriting
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.digits import DigitNetwork, load_or_train_digit_network
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.latin_squares import LatinSquareScores
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.patch_vq import PatchVQTokenizer, cut_patches, join_patches

ORDER = 5


class LatinSquaresDataModule(IndexedDataModule):
    """Latin squares of handwritten digits as 25 tokens, one per cell.

    The tokenizer's codebook is k-means over the training handwriting, a few codes for each digit. Codebook and digit
    network are made once, seeded, and cached under ``root``.

    Args:
        root: folder of the cached files.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_train: pictures to train on.
        num_held_out: pictures of held-out handwriting, the reference of the metrics.
        codes_per_digit: ways of writing each digit that the tokenizer tells apart.
        num_workers: loader processes; the data is in memory, so 0 is fastest.
        seed: of the order of training samples; what the pictures are does not depend on it.
    """

    num_classes = ORDER
    input_shape: tuple[int, ...] = (ORDER, ORDER)
    primary_metric = "valid_squares"
    higher_is_better = True

    def __init__(
        self,
        root: str = "data/latin_squares",
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_train: int = 50_000,
        num_held_out: int = 2_000,
        codes_per_digit: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        if num_train < 1 or num_held_out < 2 or not 1 <= codes_per_digit <= 100:
            raise ValueError("need num_train >= 1, num_held_out >= 2 and codes_per_digit from 1 to 100")
        self.root, self.num_train, self.num_held_out = Path(root), num_train, num_held_out
        self.codes_per_digit = codes_per_digit
        self.num_codes = ORDER * codes_per_digit

    @property
    def codebook_path(self) -> Path:
        """Where the codebook is cached; its size is part of the name."""
        return self.root / f"codebook_{self.num_codes}.safetensors"

    def prepare_data(self) -> None:
        """Make the codebook and the digit network, once."""
        training = load_handwriting(held_out=False)
        if not self.codebook_path.is_file():
            PatchVQTokenizer.save(self.codebook_path, fit_codebook(training, self.codes_per_digit), (ORDER, ORDER))
        self.load_digit_network()

    def load_digit_network(self) -> DigitNetwork:
        """Load the network that reads cells, training it where there is no cached one."""
        path = self.root / "digit_network.safetensors"
        return load_or_train_digit_network(path, load_handwriting(held_out=False), load_handwriting(held_out=True))

    def setup(self, stage: str) -> None:
        """Draw the pictures and encode them."""
        self._tokenizer = self.load_tokenizer()
        if stage != "predict":
            self._held_out_set = self._encode(self.num_held_out, held_out=True)

    def _encode(self, count: int, held_out: bool) -> TensorBatches:
        pictures, labels = draw_pictures(count, self.load_writings(held_out), seed=int(held_out))
        codes = torch.cat([self._tokenizer.encode(part.float()) for part in pictures.split(1000)])
        return TensorBatches(codes, labels)

    def load_tokenizer(self) -> Tokenizer:
        """Load the patch tokenizer."""
        return PatchVQTokenizer(str(self.codebook_path))

    def load_writings(self, held_out: bool) -> Handwriting:
        """Load what pictures are made of.

        The few writings whose nearest code is another digit's are left out: their tokens would not be Latin squares.
        """
        handwriting = load_handwriting(held_out)
        codes = PatchVQTokenizer(str(self.codebook_path)).nearest(handwriting.images[:, 0])
        kept = codes // self.codes_per_digit + 1 == handwriting.labels
        return Handwriting(handwriting.images[kept], handwriting.labels[kept])

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        return self._tokenizer

    def training_set(self) -> TensorBatches:  # noqa: D102
        return self._encode(self.num_train, held_out=False)

    def held_out_set(self) -> TensorBatches:  # noqa: D102
        return self._held_out_set

    def build_metrics(self) -> list[SampleMetric]:
        """``valid_squares``, ``valid_lines``; and ``fd_digits``, of the digit network's features averaged over cells.

        The reference of ``fd_digits`` is untokenised pictures of held-out handwriting: what the tokenizer loses counts.
        """
        network = self.load_digit_network()

        def picture_features(pixels: Tensor) -> Tensor:
            cells = cut_patches(pixels, SIDE)
            return network.features(cells.flatten(0, 1).unsqueeze(1)).view(*cells.shape[:2], -1).mean(1)

        distance = FrechetDistance("fd_digits", picture_features, network.num_features, "digit_network")
        pictures, _ = draw_pictures(self.num_held_out, load_handwriting(held_out=True), seed=1)
        distance.set_reference(pictures.split(500))
        # Reading cells needs the network on the samples' device: a module inside a metric moves with it.
        distance.network = network
        return [LatinSquareScores(network, ORDER), distance]


def draw_pictures(count: int, handwriting: Handwriting, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures (count, 1, 40, 40) float in [0, 1] and labels (count,), the digit in the centre less one.

    Squares are uniform over all 161,280 Latin squares of order 5; every cell is a random writing of its digit.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = draw_latin_squares(count, generator)
    writings = torch.empty(count, ORDER * ORDER, SIDE, SIDE)
    for digit in range(1, ORDER + 1):
        cells = digits.flatten(1) == digit
        choices = handwriting.images[handwriting.labels == digit, 0]
        writings[cells] = choices[torch.randint(len(choices), (int(cells.sum()),), generator=generator)]
    return join_patches(writings, (ORDER, ORDER)), digits[:, ORDER // 2, ORDER // 2] - 1


def draw_latin_squares(count: int, generator: torch.Generator) -> Tensor:
    """Draw Latin squares uniformly: (count, 5, 5) int64 in 1…5.

    Each of the 56 reduced squares (first row and column in order), its columns permuted (5!) and its rows after the
    first permuted (4!), gives every one of the 161,280 Latin squares of order 5 once.
    """
    reduced = torch.tensor(reduced_latin_squares(ORDER))
    chosen = reduced[torch.randint(len(reduced), (count,), generator=generator)]
    rows = torch.cat([torch.zeros(count, 1), 1 + torch.rand(count, ORDER - 1, generator=generator)], dim=1).argsort(
        dim=1
    )
    columns = torch.rand(count, ORDER, generator=generator).argsort(dim=1)
    chosen = chosen.gather(1, rows[:, :, None].expand_as(chosen))
    return chosen.gather(2, columns[:, None, :].expand_as(chosen))


def reduced_latin_squares(order: int) -> list[list[tuple[int, ...]]]:
    """List the Latin squares whose first row and first column are 1…n, row by row with backtracking."""

    def extend(rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        if len(rows) == order:
            return [rows]
        return [
            square
            for row in itertools.permutations(range(1, order + 1))
            if row[0] == len(rows) + 1 and all(a != b for earlier in rows for a, b in zip(row, earlier, strict=True))
            for square in extend([*rows, row])
        ]

    return extend([tuple(range(1, order + 1))])


def fit_codebook(handwriting: Handwriting, codes_per_digit: int) -> Tensor:
    """Run k-means over each digit's writings: (5·codes_per_digit, 8, 8) float in [0, 1]."""
    from sklearn.cluster import KMeans

    centres = []
    for digit in range(1, ORDER + 1):
        writings = handwriting.images[handwriting.labels == digit].flatten(1).numpy()
        centres.append(KMeans(codes_per_digit, n_init=4, random_state=0).fit(writings).cluster_centers_)
    return torch.cat([torch.from_numpy(c) for c in centres]).float().view(-1, SIDE, SIDE).clamp(0, 1)

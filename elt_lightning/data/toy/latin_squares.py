"""Latin squares written by hand: pictures that take a network of some depth to get right, without a download.

A picture of 8n×8n pixels shows an n×n Latin square (each of the digits 1…n once in every row and column), every cell a
real handwritten digit. The label is the digit in the centre, or for even n in the cell right of it and below. Whether a
sample is right can be read off exactly.
"""

import itertools
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from elt_lightning.data.base import IndexedDataModule, Request, TensorBatches
from elt_lightning.errors import check_memory
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.digits import DigitNetwork, load_digit_network
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.handwriting import SIDE, Handwriting, load_handwriting
from elt_lightning.metrics.latin_squares import LatinSquareScores
from elt_lightning.processes.masking import ranks
from elt_lightning.processes.noise import Stream, sample_seeds, uniform
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.patch_vq import PatchVQTokenizer, cut_patches, join_patches

PUZZLE_SEED = 0
"""Which cells of a puzzle are given depends on its number alone: every model and every run gets the same puzzles."""


class LatinSquaresDataModule(IndexedDataModule):
    """Latin squares of handwritten digits as n² tokens, one per cell.

    The tokenizer's codebook is k-means over the training handwriting, a few codes for each digit. Codebook and digit
    network are made once, seeded, and cached under ``root``.

    With ``num_given`` a sweep sets puzzles: sample i is given the label and that many cells of held-out square i mod
    ``num_val``, and has to fill in the others. Any valid square is right, also where a puzzle has more than one.
    ``num_given`` changes sampling only, not training. What is held out is handwriting: the squares themselves are drawn
    from all there are; small orders have so few that many are trained on.

    Args:
        root: folder of the cached files.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_train: pictures to train on.
        num_val: pictures of held-out handwriting, the reference of the metrics.
        codes_per_digit: ways of writing each digit that the tokenizer tells apart.
        order: n, from 2 to 6.
        num_given: cells of each sample that are given, less than n².
        num_workers: loader processes; the data is in memory, so 0 is fastest.
        seed: of the order of training samples; what the pictures are does not depend on it.
    """

    boxes: tuple[int, int] | None = None
    primary_metric = "valid_squares"
    higher_is_better = True

    def __init__(
        self,
        root: str = "data/latin_squares",
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_train: int = 50_000,
        num_val: int = 2_000,
        codes_per_digit: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        order: int = 5,
        num_given: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        if not 2 <= order <= 6 or not 0 <= num_given < order**2:
            raise ValueError(f"need order from 2 to 6 and num_given from 0 to order² - 1, not {order} and {num_given}")
        if num_train < 1 or num_val < 2 or not 1 <= codes_per_digit <= 100:
            raise ValueError("need num_train >= 1, num_val >= 2 and codes_per_digit from 1 to 100")
        for name, count in (("num_train", num_train), ("num_val", num_val)):
            check_memory(f"{name} {count}", count * 4 * (SIDE * order) ** 2)
        self.root, self.num_train, self.num_val = Path(root), num_train, num_val
        self.codes_per_digit, self.num_given = codes_per_digit, num_given
        self.order = self.num_classes = order
        self.class_names = [f"{digit} in the centre" for digit in range(1, order + 1)]
        self.input_shape = (order, order)
        self.codebook_size = order * codes_per_digit

    @property
    def codebook_path(self) -> Path:
        """Where the codebook is cached; digits and codes of each are part of the name."""
        return self.root / f"codebook_{self.order}x{self.codes_per_digit}.safetensors"

    def prepare_data(self) -> None:
        """Make the codebook and the digit network, once."""
        training = load_handwriting(val=False)
        if not self.codebook_path.is_file():
            codebook = fit_codebook(training, self.order, self.codes_per_digit)
            PatchVQTokenizer.save(self.codebook_path, codebook, (self.order, self.order))
            print(f"made {self.codebook_path}: the codebook", flush=True)
        self.load_digit_network()

    def load_digit_network(self) -> DigitNetwork:
        """Load the network that reads cells, training it where there is no cached one."""
        return load_digit_network(self.root)

    def setup(self, stage: str) -> None:
        """Draw the pictures and encode them."""
        self._tokenizer = self.load_tokenizer()
        if stage != "predict" or self.num_given:
            self._val_set = self._encode(self.num_val, val=True)

    def _encode(self, count: int, val: bool) -> TensorBatches:
        pictures, labels = self.draw_pictures(count, self.load_writings(val), seed=int(val))
        codes = torch.cat([self._tokenizer.encode(part.float()) for part in pictures.split(1000)])
        return TensorBatches(codes, labels)

    def draw_pictures(self, count: int, handwriting: Handwriting, seed: int) -> tuple[Tensor, Tensor]:
        """Draw pictures (count, 1, 8n, 8n) float in [0, 1], and labels (count,): the digit in the centre less one."""
        generator = torch.Generator().manual_seed(seed)
        digits = self.draw_squares(count, generator)
        pictures = write_squares(digits, handwriting, generator)
        return pictures, digits[:, self.order // 2, self.order // 2] - 1

    def draw_squares(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw squares uniformly: (count, n, n) int64 in 1…n."""
        return draw_latin_squares(count, generator, self.order)

    def load_tokenizer(self) -> Tokenizer:
        """Load the patch tokenizer."""
        return PatchVQTokenizer(str(self.codebook_path))

    def load_writings(self, val: bool) -> Handwriting:
        """Load the writings that pictures are made of.

        The few writings whose nearest code is another digit's are left out: their tokens would not be Latin squares.
        """
        handwriting = load_handwriting(val)
        codes = PatchVQTokenizer(str(self.codebook_path)).nearest(handwriting.images[:, 0])
        kept = codes // self.codes_per_digit + 1 == handwriting.labels
        return Handwriting(handwriting.images[kept], handwriting.labels[kept])

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        return self._tokenizer

    def training_set(self) -> TensorBatches:  # noqa: D102
        return self._encode(self.num_train, val=False)

    def val_set(self) -> TensorBatches:  # noqa: D102
        return self._val_set

    def request(self, indices: Tensor) -> Request:
        """Ask for one class after the other, or set the puzzles with these numbers (B,)."""
        if not self.num_given:
            return super().request(indices)
        assert self.codebook_size is not None
        squares = self._val_set[indices.cpu() % self.num_val]
        order = ranks(uniform(sample_seeds(PUZZLE_SEED, indices.cpu()), 0, Stream.GIVEN_CELLS, squares.x.shape[1:]))
        known = squares.x.masked_fill(order >= self.num_given, self.codebook_size)
        return Request(squares.labels.to(indices.device), indices, known.to(indices.device))

    def build_metrics(self) -> list[SampleMetric]:
        """Build ``valid_squares``, ``valid_lines``, and ``fd_digits`` over the digit network's mean features.

        The reference of ``fd_digits`` is untokenised pictures of held-out handwriting: what the tokenizer loses counts.
        """
        network = self.load_digit_network()

        def picture_features(pixels: Tensor) -> Tensor:
            cells = cut_patches(pixels, SIDE)
            return network.features(cells.flatten(0, 1).unsqueeze(1)).view(*cells.shape[:2], -1).mean(1)

        distance = FrechetDistance("fd_digits", network, "digit_network", picture_features)
        pictures, _ = self.draw_pictures(self.num_val, load_handwriting(val=True), seed=1)
        distance.set_reference(pictures.split(500))
        return [LatinSquareScores(network, self.order, self.boxes), distance]


def write_squares(digits: Tensor, handwriting: Handwriting, generator: torch.Generator) -> Tensor:
    """Draw digits (B, n, n) in 1…n, each in a random writing of it: (B, 1, 8n, 8n) float in [0, 1]."""
    count, order, _ = digits.shape
    writings = torch.empty(count, order * order, SIDE, SIDE)
    for digit in range(1, order + 1):
        cells = digits.flatten(1) == digit
        choices = handwriting.images[handwriting.labels == digit, 0]
        writings[cells] = choices[torch.randint(len(choices), (int(cells.sum()),), generator=generator)]
    return join_patches(writings, (order, order))


def draw_latin_squares(count: int, generator: torch.Generator, order: int = 5) -> Tensor:
    """Draw Latin squares uniformly: (count, n, n) int64 in 1…n.

    Each of the reduced squares (first row and column in order), its columns permuted (n!) and its rows after the
    first permuted ((n − 1)!), gives every Latin square once: of order 5, 56 reduced ones give all 161,280.
    """
    reduced = torch.tensor(reduced_latin_squares(order))
    chosen = reduced[torch.randint(len(reduced), (count,), generator=generator)]
    later_rows = 1 + torch.rand(count, order - 1, generator=generator)
    rows = torch.cat([torch.zeros(count, 1), later_rows], dim=1).argsort(dim=1)
    columns = torch.rand(count, order, generator=generator).argsort(dim=1)
    chosen = chosen.gather(1, rows[:, :, None].expand_as(chosen))
    return chosen.gather(2, columns[:, None, :].expand_as(chosen))


@cache
def reduced_latin_squares(order: int) -> list[list[tuple[int, ...]]]:
    """List the Latin squares whose first row and first column are 1…n, row by row with backtracking."""
    symbols = range(1, order + 1)
    rows_from = {first: [row for row in itertools.permutations(symbols) if row[0] == first] for first in symbols}

    def extend(rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        if len(rows) == order:
            return [rows]
        return [
            square
            for row in rows_from[len(rows) + 1]
            if all(a != b for earlier in rows for a, b in zip(row, earlier, strict=True))
            for square in extend([*rows, row])
        ]

    return extend([tuple(symbols)])


def fit_codebook(handwriting: Handwriting, order: int, codes_per_digit: int) -> Tensor:
    """Run k-means over the writings of each of the digits 1…n: (n·codes_per_digit, 8, 8) float in [0, 1]."""
    from sklearn.cluster import KMeans

    centres = []
    for digit in range(1, order + 1):
        writings = handwriting.images[handwriting.labels == digit].flatten(1).numpy()
        centres.append(KMeans(codes_per_digit, n_init=4, random_state=0).fit(writings).cluster_centers_)
    return torch.cat([torch.from_numpy(c) for c in centres]).float().view(-1, SIDE, SIDE).clamp(0, 1)

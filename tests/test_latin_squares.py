import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from elt_lightning.data.toy.latin_squares import (
    LatinSquaresDataModule,
    draw_latin_squares,
    reduced_latin_squares,
)
from elt_lightning.metrics.digits import DigitNetwork
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.handwriting import Handwriting, load_handwriting
from elt_lightning.metrics.latin_squares import LatinSquareScores, valid_lines
from elt_lightning.tokenizers.patch_vq import cut_patches

Square = tuple[tuple[int, ...], ...]

CYCLIC = [[(row + column) % 5 + 1 for column in range(5)] for row in range(5)]


def is_latin(square: Square) -> bool:
    symbols = set(range(1, len(square) + 1))
    return all(set(line) == symbols for line in (*square, *zip(*square, strict=True)))


def as_tuples(squares: Tensor) -> Iterator[Square]:
    return (tuple(map(tuple, square)) for square in squares.tolist())


def reduced_form(square: Square) -> tuple[Square, tuple[int, ...], tuple[int, ...]]:
    """The square with columns ordered by its first row and rows by their first column, and both orders."""
    columns = tuple(square[0])
    ordered = [tuple(value for _, value in sorted(zip(columns, row, strict=True))) for row in square]
    rows = tuple(row[0] for row in ordered)
    return tuple(sorted(ordered)), columns, rows


@pytest.mark.parametrize(
    ("order", "count"), [(1, 1), (2, 1), (3, 1), (4, 4), (5, 56), pytest.param(6, 9408, marks=pytest.mark.slow)]
)
def test_the_number_of_reduced_squares_is_the_known_one(order: int, count: int) -> None:
    squares = [tuple(square) for square in reduced_latin_squares(order)]
    assert len(set(squares)) == len(squares) == count
    first = tuple(range(1, order + 1))
    assert all(is_latin(s) and s[0] == first and tuple(row[0] for row in s) == first for s in squares)


def test_permuting_the_reduced_squares_gives_all_161280_once() -> None:
    seen = set()
    for square in reduced_latin_squares(5):
        for rest in itertools.permutations(square[1:]):
            for columns in itertools.permutations(range(5)):
                seen.add(bytes(row[c] for row in (square[0], *rest) for c in columns))
    assert len(seen) == 161_280


@pytest.mark.parametrize("order", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_squares_of_other_orders(order: int, latin_squares_root: Path) -> None:
    squares = draw_latin_squares(200, torch.Generator().manual_seed(0), order)
    assert all(is_latin(square) for square in as_tuples(squares))
    data = LatinSquaresDataModule(str(latin_squares_root), num_train=20, num_val=20, order=order)
    data.prepare_data()
    data.setup("fit")
    assert (data.num_classes, data.input_shape, data.codebook_size) == (order, (order, order), 8 * order)
    codes, labels, _ = data.training_set()[torch.arange(20)]
    scores = next(m for m in data.build_metrics() if isinstance(m, LatinSquareScores))
    scores.update(data.tokenizer.decode(codes), labels)
    assert {name: value.item() for name, value in scores.compute().items()} == {"valid_squares": 1, "valid_lines": 1}


@pytest.mark.parametrize("seed", range(2))
def test_squares_are_drawn_uniformly(seed: int) -> None:
    count = 30_000
    squares = list(as_tuples(draw_latin_squares(count, torch.Generator().manual_seed(seed))))
    assert all(is_latin(square) for square in squares)
    parts = [reduced_form(square) for square in squares]
    for place, kinds in ((0, 56), (1, 120), (2, 24)):
        names = {name: number for number, name in enumerate({part[place] for part in parts})}
        assert len(names) == kinds
        counts = torch.bincount(torch.tensor([names[part[place]] for part in parts]))
        assert stats.chisquare(counts).pvalue > 1e-3
    # Uniform over n squares, m draws meet n·(1 − (1 − 1/n)^m) different ones; the standard deviation here is about 47.
    expected = 161_280 * (1 - (1 - 1 / 161_280) ** count)
    assert abs(len(set(squares)) - expected) < 5 * 47


def test_valid_lines_on_squares_made_by_hand() -> None:
    good = torch.tensor(CYCLIC)
    assert valid_lines(good[None]).tolist() == [[True] * 10]
    one_wrong = good.clone()
    one_wrong[1, 3] = one_wrong[1, 3] % 5 + 1
    rows_only = torch.arange(1, 6).expand(5, 5)
    with_zero, with_six = good - 1, good.where(good != 5, 6)
    expected_one_wrong = [place not in (1, 5 + 3) for place in range(10)]
    squares = torch.stack([one_wrong, rows_only, rows_only.T, with_zero, with_six, torch.ones_like(good)])
    assert valid_lines(squares).tolist() == [
        expected_one_wrong,
        [True] * 5 + [False] * 5,
        [False] * 5 + [True] * 5,
        [False] * 10,
        [False] * 10,
        [False] * 10,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_valid_lines_equal_sets_on_random_squares(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    squares = draw_latin_squares(200, generator)
    swap = torch.rand(200, 5, 5, generator=generator) < 0.05
    squares = torch.where(swap, torch.randint(0, 10, (200, 5, 5), generator=generator), squares)
    for square, valid in zip(as_tuples(squares), valid_lines(squares).tolist(), strict=True):
        assert valid == [sorted(line) == [1, 2, 3, 4, 5] for line in (*square, *zip(*square, strict=True))]


class GreyReader(nn.Module):
    """Read a cell whose grey level is digit / 10."""

    def forward(self, cells: Tensor) -> Tensor:
        return nn.functional.one_hot((cells.mean((1, 2, 3)) * 10).round().long(), 10).float()


def grey_pictures(squares: Tensor) -> Tensor:
    return (squares / 10).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_the_shares_counted_one_picture_at_a_time(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    squares = draw_latin_squares(150, generator)
    wrong = torch.rand(150, 5, 5, generator=generator) < 0.02
    squares = torch.where(wrong, torch.randint(0, 10, (150, 5, 5), generator=generator), squares)
    labels = squares[:, 2, 2] - 1
    labels[::7] = (labels[::7] + 1) % 5
    metric = LatinSquareScores(GreyReader(), 5)
    assert torch.equal(metric.read(grey_pictures(squares)), squares)
    for pixels, asked in zip(grey_pictures(squares).split(40), labels.split(40), strict=True):
        metric.update(pixels, asked)
    scores = metric.compute()
    whole = [is_latin(s) and s[2][2] == label + 1 for s, label in zip(as_tuples(squares), labels.tolist(), strict=True)]
    lines = [sorted(line) == [1, 2, 3, 4, 5] for s in as_tuples(squares) for line in (*s, *zip(*s, strict=True))]
    assert 0 < sum(whole) < 150
    assert scores["valid_squares"].item() == pytest.approx(sum(whole) / 150)
    assert scores["valid_lines"].item() == pytest.approx(sum(lines) / 1500)


def training_and_val() -> tuple[Handwriting, Handwriting]:
    return load_handwriting(val=False), load_handwriting(val=True)


def test_training_and_val_handwriting_are_disjoint_and_complete() -> None:
    training, val = training_and_val()
    assert len(training.images) + len(val.images) == 1797
    seen, unseen = ({image.numpy().tobytes() for image in part.images} for part in (training, val))
    assert not seen & unseen
    for digit in range(10):
        of_digit = [int((part.labels == digit).sum()) for part in (training, val)]
        assert of_digit[1] == sum(of_digit) // 5
    for part in (training, val):
        assert part.images.shape[1:] == (1, 8, 8)
        assert torch.equal(part.images * 16, (part.images * 16).round())
        assert part.images.min() == 0
        assert part.images.max() == 1


@pytest.mark.parametrize("val", [False, True])
def test_pictures_show_latin_squares_in_the_handwriting_that_was_asked_for(val: bool) -> None:
    handwriting, draw_pictures = load_handwriting(val), LatinSquaresDataModule().draw_pictures
    digit_of = {i.numpy().tobytes(): int(d) for i, d in zip(handwriting.images, handwriting.labels, strict=True)}
    pictures, labels = draw_pictures(60, handwriting, seed=4)
    assert pictures.shape == (60, 1, 40, 40)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        square = tuple(
            tuple(digit_of[picture[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].numpy().tobytes()] for c in range(5))
            for r in range(5)
        )
        assert is_latin(square)
        assert square[2][2] == label + 1
    again, _ = draw_pictures(60, handwriting, seed=4)
    assert torch.equal(again, pictures)
    assert not torch.equal(draw_pictures(60, handwriting, seed=5)[0], pictures)


@pytest.fixture(scope="module")
def data(latin_squares_root: Path) -> LatinSquaresDataModule:
    data = LatinSquaresDataModule(str(latin_squares_root), num_train=400, num_val=300)
    data.setup("fit")
    return data


def read_codebook(network: DigitNetwork, codebook: Tensor) -> list[int]:
    with torch.no_grad():
        return network(codebook[:, None]).argmax(1).tolist()


def test_every_codebook_entry_is_read_as_its_own_digit(data: LatinSquaresDataModule) -> None:
    codebook = data.tokenizer.codebook
    assert codebook.shape == (40, 8, 8)
    assert read_codebook(data.load_digit_network(), codebook) == [code // 8 + 1 for code in range(40)]


def test_the_digit_network_reads_val_handwriting(data: LatinSquaresDataModule) -> None:
    network, (training, val) = data.load_digit_network(), training_and_val()
    for part, least in ((training, 0.985), (val, 0.97)):
        assert (network(part.images).argmax(1) == part.labels).float().mean() > least
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


@pytest.mark.parametrize("seed", range(3))
def test_codes_come_back_from_their_own_pictures(data: LatinSquaresDataModule, seed: int) -> None:
    codes = torch.randint(0, 40, (30, 25), generator=torch.Generator().manual_seed(seed))
    pixels = data.tokenizer.decode(codes)
    assert pixels.shape == (30, 1, 40, 40)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert torch.equal(data.tokenizer.encode(pixels), codes)


def test_perfect_codes_score_one(data: LatinSquaresDataModule) -> None:
    squares = draw_latin_squares(200, torch.Generator().manual_seed(1))
    codes = (squares.flatten(1) - 1) * 8 + torch.randint(0, 8, (200, 25))
    scores = next(m for m in data.build_metrics() if isinstance(m, LatinSquareScores))
    scores.update(data.tokenizer.decode(codes), squares[:, 2, 2] - 1)
    assert {name: value.item() for name, value in scores.compute().items()} == {"valid_squares": 1, "valid_lines": 1}


def test_all_that_is_trained_on_and_val_is_latin_squares(data: LatinSquaresDataModule) -> None:
    """Writings whose nearest code is another digit's are left out: they would bound what a model can learn."""
    for samples in (data.training_set(), data.val_set()):
        digits = samples.x // data.codes_per_digit + 1
        assert valid_lines(digits.view(-1, 5, 5)).all()
        assert torch.equal(digits[:, 12] - 1, samples.labels)


def test_labels_and_codes_of_both_sets(data: LatinSquaresDataModule) -> None:
    assert (len(data.training_set()), len(data.val_set())) == (400, 300)
    batch = data.training_set()[torch.tensor([5, 3])]
    assert batch.x.shape == (2, 25)
    assert batch.x.dtype == batch.labels.dtype == torch.int64
    assert batch.indices.tolist() == [5, 3]
    assert set(data.training_set().labels.tolist()) == set(range(5))


def test_the_order_seed_changes_no_picture_and_a_second_set_up_gives_the_same(latin_squares_root: Path) -> None:
    sets = []
    for seed in (0, 7):
        data = LatinSquaresDataModule(str(latin_squares_root), num_train=50, num_val=20, seed=seed)
        data.setup("fit")
        sets.append((data.training_set().x, data.val_set().x))
    assert torch.equal(sets[0][0], sets[1][0])
    assert torch.equal(sets[0][1], sets[1][1])


def test_fd_digits_compares_features_averaged_over_cells(data: LatinSquaresDataModule) -> None:
    metric = next(m for m in data.build_metrics() if isinstance(m, FrechetDistance))
    assert (metric.name, metric.feature_network) == ("fd_digits", "digit_network")
    pictures, labels = data.draw_pictures(300, load_handwriting(val=True), seed=1)
    metric.update(pictures, labels)
    assert metric.compute()["fd_digits"].item() < 1e-5
    network = data.load_digit_network()
    with torch.no_grad():
        features = torch.stack([network.features(cut_patches(p[None], 8)[0][:, None]).mean(0) for p in pictures])
    torch.testing.assert_close(metric.moments().mean, features.double().mean(0), rtol=1e-5, atol=1e-6)
    metric.reset()
    metric.update(torch.rand(300, 1, 40, 40), labels)
    assert metric.compute()["fd_digits"].item() > 1


def test_impossible_sizes_are_refused() -> None:
    for wrong in (
        {"num_train": 0},
        {"num_val": 1},
        {"codes_per_digit": 0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"order": 1},
        {"order": 7},
        {"num_given": 25},
        {"num_given": -1},
    ):
        with pytest.raises(ValueError, match=r"num_|codes|batch"):
            LatinSquaresDataModule(**wrong)

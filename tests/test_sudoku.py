import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from small_runs import SMALL
from torch import Tensor

from elt_lightning.cli import main
from elt_lightning.data.toy.sudoku import SudokuDataModule, draw_sudokus, sudokus_from_first_row
from elt_lightning.evaluation.sweep import Sweep
from elt_lightning.metrics.latin_squares import LatinSquareScores, valid_lines
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule

Grid = tuple[tuple[int, ...], ...]

BOXES = [(2, 2), (2, 3), (3, 2)]


def lines_of(grid: Grid, boxes: tuple[int, int]) -> Iterator[list[int]]:
    """Rows, columns and boxes, cell by cell."""
    order = len(grid)
    yield from map(list, grid)
    yield from ([grid[row][column] for row in range(order)] for column in range(order))
    for top, left in itertools.product(range(0, order, boxes[0]), range(0, order, boxes[1])):
        yield [grid[top + row][left + column] for row in range(boxes[0]) for column in range(boxes[1])]


def is_sudoku(grid: Grid, boxes: tuple[int, int]) -> bool:
    return all(sorted(line) == list(range(1, len(grid) + 1)) for line in lines_of(grid, boxes))


def as_grids(squares: Tensor) -> list[Grid]:
    return [tuple(map(tuple, square)) for square in squares.tolist()]


@pytest.mark.parametrize(
    ("boxes", "all_sudokus"),
    [((2, 2), 288), pytest.param((2, 3), 28_200_960, marks=pytest.mark.slow), ((3, 2), 28_200_960)],
)
def test_the_number_of_sudokus_is_the_known_one(boxes: tuple[int, int], all_sudokus: int) -> None:
    grids = sudokus_from_first_row(boxes)
    order = boxes[0] * boxes[1]
    assert len(set(grids)) == len(grids) == all_sudokus // math.factorial(order)
    assert all(is_sudoku(grid, boxes) and grid[0] == tuple(range(1, order + 1)) for grid in grids[:: len(grids) // 12])


@pytest.mark.parametrize("seed", range(2))
def test_small_sudokus_are_drawn_uniformly(seed: int) -> None:
    grids = as_grids(draw_sudokus(30_000, (2, 2), torch.Generator().manual_seed(seed)))
    names = {grid: number for number, grid in enumerate(set(grids))}
    assert len(names) == 288
    counts = np.bincount([names[grid] for grid in grids])
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("boxes", BOXES)
def test_drawn_sudokus_are_valid(boxes: tuple[int, int]) -> None:
    grids = as_grids(draw_sudokus(300, boxes, torch.Generator().manual_seed(3)))
    assert all(is_sudoku(grid, boxes) for grid in grids)
    assert boxes == (2, 2) or len(set(grids)) == 300


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("seed", range(3))
def test_valid_lines_equal_sets_on_random_grids(boxes: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grids = draw_sudokus(200, boxes, generator)
    swap = torch.rand(grids.shape, generator=generator) < 0.05
    grids = torch.where(swap, torch.randint(0, 10, grids.shape, generator=generator), grids)
    order = boxes[0] * boxes[1]
    for grid, valid in zip(as_grids(grids), valid_lines(grids, boxes).tolist(), strict=True):
        assert valid == [sorted(line) == list(range(1, order + 1)) for line in lines_of(grid, boxes)]


def test_a_latin_square_without_right_boxes_is_no_sudoku() -> None:
    cyclic = torch.tensor([[(row + column) % 6 + 1 for column in range(6)] for row in range(6)])
    assert valid_lines(cyclic[None]).all()
    assert valid_lines(cyclic[None], (2, 3))[0].tolist() == [True] * 12 + [False] * 6


@pytest.fixture(scope="module")
def make_data(latin_squares_root: Path) -> Callable[..., SudokuDataModule]:
    def make(stage: str = "fit", **settings: object) -> SudokuDataModule:
        sizes: dict[str, object] = {"num_train": 60, "num_val": 40, "codes_per_digit": 4}
        data = SudokuDataModule(str(latin_squares_root), **(sizes | settings))  # type: ignore[arg-type]
        data.prepare_data()
        data.setup(stage)
        return data

    return make


@pytest.mark.parametrize("boxes", BOXES)
def test_data_are_sudokus_that_score_one(make_data: Callable[..., SudokuDataModule], boxes: tuple[int, int]) -> None:
    data = make_data(boxes=boxes)
    order = boxes[0] * boxes[1]
    assert (data.num_classes, data.input_shape, data.codebook_size) == (order, (order, order), 4 * order)
    scores = next(m for m in data.build_metrics() if isinstance(m, LatinSquareScores))
    for samples in (data.training_set(), data.val_set()):
        digits = (samples.x // 4 + 1).view(-1, order, order)
        assert all(is_sudoku(grid, boxes) for grid in as_grids(digits))
        assert torch.equal(digits[:, order // 2, order // 2] - 1, samples.labels)
        scores.update(data.tokenizer.decode(samples.x), samples.labels)
    assert {name: value.item() for name, value in scores.compute().items()} == {"valid_squares": 1, "valid_lines": 1}
    right = data.tokenizer.decode(data.val_set().x)
    transposed = (
        right.unflatten(2, (order, 8)).unflatten(4, (order, 8)).permute(0, 1, 4, 3, 2, 5).flatten(4).flatten(2, 3)
    )
    scores.reset()
    scores.update(transposed, data.val_set().labels)
    share = scores.compute()["valid_lines"].item()
    assert share == 1 if boxes == (2, 2) else 2 / 3 <= share < 1  # rows and columns stay right, other boxes do not


def test_puzzles_do_not_depend_on_batches_and_give_parts_of_val_squares(
    make_data: Callable[..., SudokuDataModule],
) -> None:
    data = make_data(num_given=10)
    together = data.request(torch.arange(90))
    known = together.known
    assert known is not None
    for start in (0, 7, 63):
        part = data.request(torch.arange(start, 90))
        assert part.known is not None
        assert torch.equal(part.known, known[start:])
    squares = data.val_set()
    given = known != data.codebook_size
    assert (given.sum(1) == 10).all()
    index = torch.arange(90) % 40
    assert torch.equal(known[given], squares.x[index][given])
    assert torch.equal(together.labels, squares.labels[index])
    assert len({tuple(row) for row in given.tolist()}) == 90  # a square that comes again is another puzzle
    # Every cell is given about equally often: 90 draws of probability 10/36.
    assert stats.chisquare(given.sum(0).numpy()).pvalue > 1e-3
    predicted = make_data("predict", num_given=10).request(torch.arange(90))
    assert predicted.known is not None
    assert torch.equal(predicted.known, known)


def test_without_given_cells_classes_come_in_turn(make_data: Callable[..., SudokuDataModule]) -> None:
    asked = make_data().request(torch.arange(8))
    assert asked.known is None
    assert asked.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


class Solver(MaskGITSampler):
    """Fill a puzzle in by trying, as one would with a pencil."""

    def sample(  # type: ignore[override]
        self, predict: object, shape: object, condition: object, loops: object, seeds: Tensor, known: Tensor, *_: object
    ) -> Tensor:
        grids = torch.tensor(sudokus_from_first_row((2, 2)))
        names = torch.tensor(list(itertools.permutations(range(1, 5))))
        every = (names[:, grids.flatten(1) - 1]).flatten(0, 1)  # 288 sudokus of 16 cells
        digits = torch.where(known < 16, known // 4 + 1, 0)
        fits = ((digits[:, None] == every) | (digits[:, None] == 0)).all(-1)
        solved = (every[fits.float().argmax(1)] - 1) * 4
        return torch.where(known < 16, known, solved)


def test_a_sweep_gives_the_model_the_puzzles_and_shows_them(make_data: Callable[..., SudokuDataModule]) -> None:
    data = make_data(boxes=(2, 2), num_given=5)
    network = LoopedMaskedTransformer(16, (4, 4), 4, num_layers=1, width=16, num_heads=2)
    module = ELTModule(network, MaskingProcess(16), MaskedObjective, ILSD(2), partial(Solver, steps=2), 4).eval()
    metrics = data.build_metrics()
    sweep = Sweep(40, 16, seed=0, num_pictures=6)
    row = sweep.run(module, module.sampler, data.tokenizer, metrics, 1, data.request)
    lines = row.mean("valid_lines")
    assert lines == 1
    assert row.given.shape == row.pictures.shape == (6, 1, 37, 37)
    known = data.request(torch.arange(6)).known
    assert known is not None
    cells = row.given[:, :, :-1, :-1].unfold(2, 9, 9).unfold(3, 9, 9)[..., 1:, 1:].reshape(6, 16, 64)
    drawn = row.pictures[:, :, :-1, :-1].unfold(2, 9, 9).unfold(3, 9, 9)[..., 1:, 1:].reshape(6, 16, 64)
    given = known != 16
    assert (cells[~given] == 128).all()
    assert torch.equal(cells[given], drawn[given])


@pytest.mark.parametrize("loops", [1, 3])
def test_given_cells_stay(make_data: Callable[..., SudokuDataModule], loops: int) -> None:
    data = make_data(num_given=12)
    torch.manual_seed(0)
    network = LoopedMaskedTransformer(24, (6, 6), 6, num_layers=1, width=16, num_heads=2)
    sampler = partial(MaskGITSampler, steps=4)
    module = ELTModule(network, MaskingProcess(24), MaskedObjective, ILSD(3), sampler, num_classes=6).eval()
    asked = data.request(torch.arange(20))
    assert asked.known is not None
    codes = module.sample(asked.labels, loops, sample_seeds(0, asked.indices), asked.known)
    assert torch.equal(codes[asked.known < 24], asked.known[asked.known < 24])
    assert torch.equal(module.predict_step(asked._replace(loops=loops), 0)[0], codes)


def test_impossible_boxes_are_refused() -> None:
    for wrong in ({"boxes": (1, 5)}, {"boxes": (3, 3)}, {"boxes": (2, 3), "num_given": 36}):
        with pytest.raises(ValueError, match=r"boxes|num_given"):
            SudokuDataModule(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_config_from_training_to_pictures(
    tmp_path: Path, latin_squares_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path("configs/sudoku.yaml").resolve()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "latin_squares").symlink_to(latin_squares_root.resolve())
    monkeypatch.chdir(tmp_path)
    flags = ["--config", str(config), *SMALL, "--data.init_args.num_train=64", "--data.init_args.num_val=40"]
    training = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--run_dir=runs/sudoku"]
    assert main(["fit", *flags, *training]) == 0
    checkpoint = "runs/sudoku/checkpoints/last.ckpt"
    assert main(["test", *flags, "--ckpt_path", checkpoint, "--loops", "1,2", "--run_dir", "runs/test"]) == 0
    report = json.loads(Path("runs/test/loops.json").read_text())
    assert (report["primary_metric"], report["parts_given"]) == ("valid_squares", True)
    assert [row["loops"] for row in report["rows"]] == [1, 2]
    assert Path("runs/test/loops.png").stat().st_size > 1000
    predicting = ["--ckpt_path", checkpoint, "--samples.num_samples=5", "--samples.format=png"]
    assert main(["predict", *flags, *predicting, "--run_dir", "runs/predict"]) == 0
    pictures = sorted(Path("runs/predict/samples").glob("*.png"))
    assert len(pictures) == 5
    assert Image.open(pictures[0]).size == (48, 48)

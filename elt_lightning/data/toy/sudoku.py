"""Sudokus written by hand: Latin squares whose boxes hold every digit once, too, as drawings or as puzzles."""

from functools import cache

import torch
from torch import Tensor

from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule

Grid = tuple[tuple[int, ...], ...]


class SudokuDataModule(LatinSquaresDataModule):
    """Sudokus of handwritten digits as n² tokens, one per cell, n the number of cells in a box.

    Everything but the squares is as in :class:`~elt_lightning.data.toy.latin_squares.LatinSquaresDataModule`. The
    smallest number of given cells that can make a puzzle with one solution is 4 for 4×4 and 8 for 6×6 (Wikipedia,
    "Mathematics of Sudoku", which also has the numbers of sudokus that the tests compare with).

    Args:
        root: folder of the cached files; it may be that of Latin squares.
        boxes: rows and columns of a box: [2, 2] for 4×4 cells, [2, 3] or [3, 2] for 6×6.
        num_given: cells of each sample that are given, less than n²; 0 to draw whole sudokus.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_train: pictures to train on.
        num_val: pictures of held-out handwriting, the reference of the metrics.
        codes_per_digit: ways of writing each digit that the tokenizer tells apart.
        num_workers: loader processes; the data is in memory, so 0 is fastest.
        seed: of the order of training samples; what the pictures are does not depend on it.
    """

    def __init__(
        self,
        root: str = "data/latin_squares",
        boxes: tuple[int, int] = (2, 3),
        num_given: int = 0,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_train: int = 50_000,
        num_val: int = 2_000,
        codes_per_digit: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if min(boxes) < 2 or boxes[0] * boxes[1] > 6:
            raise ValueError(f"boxes must be of 2 by 2, 2 by 3 or 3 by 2 cells, not {boxes[0]} by {boxes[1]}")
        super().__init__(
            root,
            batch_size,
            micro_batch_size,
            num_train,
            num_val,
            codes_per_digit,
            num_workers,
            seed,
            order=boxes[0] * boxes[1],
            num_given=num_given,
        )
        self.boxes = boxes

    def draw_squares(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw sudokus uniformly: (count, n, n) int64 in 1…n."""
        assert self.boxes is not None
        return draw_sudokus(count, self.boxes, generator)


def draw_sudokus(count: int, boxes: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw sudokus uniformly: (count, n, n) int64 in 1…n.

    Each sudoku whose first row is 1…n, with its digits renamed in all n! ways, gives every sudoku once.
    """
    first_row_in_order = torch.tensor(sudokus_from_first_row(boxes))
    chosen = first_row_in_order[torch.randint(len(first_row_in_order), (count,), generator=generator)]
    names = torch.rand(count, boxes[0] * boxes[1], generator=generator).argsort(dim=1) + 1
    return names.gather(1, chosen.flatten(1) - 1).view_as(chosen)


@cache
def sudokus_from_first_row(boxes: tuple[int, int]) -> list[Grid]:
    """List the sudokus whose first row is 1…n, cell by cell with backtracking: 12 of 4×4 cells, 39,168 of 6×6."""
    height, width = boxes
    order = height * width
    every = 2 * (2**order - 1)  # bit d stands for digit d
    rows, columns, squares = ([every] * order for _ in range(3))  # what each still lacks
    grid = [0] * order**2
    found: list[Grid] = []

    def fill(cell: int) -> None:
        if cell == order**2:
            found.append(tuple(tuple(grid[start : start + order]) for start in range(0, order**2, order)))
            return
        row, column = divmod(cell, order)
        box = row // height * height + column // width
        allowed = rows[row] & columns[column] & squares[box]
        for digit in [column + 1] if row == 0 else range(1, order + 1):
            if allowed >> digit & 1:
                grid[cell] = digit
                for lacks, place in ((rows, row), (columns, column), (squares, box)):
                    lacks[place] ^= 1 << digit
                fill(cell + 1)
                for lacks, place in ((rows, row), (columns, column), (squares, box)):
                    lacks[place] ^= 1 << digit

    fill(0)
    return found

"""Exact scores of pictures that should be Latin squares or sudokus of handwritten digits, as a network reads them."""

import torch
from torch import Tensor

from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.digits import DigitNetwork
from elt_lightning.metrics.handwriting import SIDE
from elt_lightning.tokenizers.patch_vq import cut_patches


class LatinSquareScores(SampleMetric):
    """Read every cell, then judge the square.

    ``valid_squares``: share of pictures with every digit 1…n once in each row, column and box, and the asked one at the
    centre. ``valid_lines``: share of all rows, columns and boxes that hold every digit once.

    Args:
        network: reads one cell.
        order: n, cells along a side.
        boxes: rows and columns of a sudoku's boxes; None without boxes.
    """

    squares: Tensor
    lines: Tensor
    count: Tensor

    def __init__(self, network: DigitNetwork, order: int = 5, boxes: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.network, self.order, self.boxes = network, order, boxes
        for state in ("squares", "lines", "count"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def read(self, pixels: Tensor) -> Tensor:
        """Read pictures (B, 1, 8n, 8n) as digits (B, n, n) int64 in [0, 10)."""
        cells = cut_patches(pixels, SIDE).flatten(0, 1).unsqueeze(1)
        return self.network(cells).argmax(1).view(-1, self.order, self.order)

    def update(self, pixels: Tensor, labels: Tensor) -> None:  # noqa: D102
        digits = self.read(pixels)
        self.squares += self.valid_squares(digits, labels).sum()
        self.lines += valid_lines(digits, self.boxes).sum()
        self.count += len(pixels)

    def correct(self, pixels: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return self.valid_squares(self.read(pixels), labels)

    def diversity(self) -> list[SampleMetric]:
        """Count how many of the valid squares are different ones."""
        return [DistinctSquares(self)]

    def valid_squares(self, digits: Tensor, labels: Tensor) -> Tensor:
        """Return which squares (B, n, n) are valid with the asked digit, labels (B,) + 1, at the centre: (B,) bool."""
        centre = digits[:, self.order // 2, self.order // 2] - 1
        return valid_lines(digits, self.boxes).all(1) & (centre == labels)

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        lines = self.count * self.order * (3 if self.boxes else 2)
        return {"valid_squares": self.squares / self.count, "valid_lines": self.lines / lines}


class DistinctSquares(SampleMetric):
    """``distinct``: different squares among the valid ones that ``scores`` reads, over the valid ones; nan for none."""

    valid: list[Tensor] | Tensor

    def __init__(self, scores: LatinSquareScores) -> None:
        super().__init__()
        self.scores = scores
        self.add_state("valid", [], dist_reduce_fx="cat")

    def update(self, pixels: Tensor, labels: Tensor) -> None:  # noqa: D102
        digits = self.scores.read(pixels)
        assert isinstance(self.valid, list)
        self.valid.append(digits[self.scores.valid_squares(digits, labels)])

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        valid = torch.cat(self.valid) if isinstance(self.valid, list) else self.valid
        return {"distinct": torch.tensor(len(valid.unique(dim=0)) / len(valid) if len(valid) else torch.nan)}


def valid_lines(digits: Tensor, boxes: tuple[int, int] | None = None) -> Tensor:
    """Return which of the n rows, n columns and n boxes, if there are any, hold each of 1…n once.

    Digits are (B, n, n) int64, boxes given by their rows and columns; the result is (B, 2n) bool, with boxes (B, 3n).
    """
    lines = torch.cat([digits, digits.transpose(1, 2)], dim=1)  # B 2n n
    if boxes:
        in_boxes = digits.unflatten(1, (-1, boxes[0])).unflatten(3, (-1, boxes[1])).transpose(2, 3)
        lines = torch.cat([lines, in_boxes.flatten(1, 2).flatten(2)], dim=1)
    wanted = torch.arange(1, digits.shape[-1] + 1, device=digits.device)
    return (lines.sort(dim=-1).values == wanted).all(-1)

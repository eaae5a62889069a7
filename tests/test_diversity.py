"""Precision, recall and coverage against loops written by hand, and distinct squares."""

import pytest
import torch
from torch import Tensor

from elt_lightning.metrics.diversity import manifold_scores
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.latin_squares import LatinSquareScores
from elt_lightning.metrics.small_networks import FeatureNetwork


def by_hand(real: Tensor, samples: Tensor, neighbours: int) -> dict[str, float]:
    def reach(points: Tensor, place: int) -> float:
        return sorted(float((points[place] - other).norm()) for other in points)[neighbours]

    def near(points: Tensor, place: int, other: Tensor) -> bool:
        return float((points[place] - other).norm()) <= reach(points, place)

    def share(flags: list[bool]) -> float:
        return sum(flags) / len(flags)

    return {
        "precision": share([any(near(real, i, sample) for i in range(len(real))) for sample in samples]),
        "recall": share([any(near(samples, i, picture) for i in range(len(samples))) for picture in real]),
        "coverage": share([any(near(real, i, sample) for sample in samples) for i in range(len(real))]),
    }


def test_scores_equal_those_of_loops_by_hand() -> None:
    torch.manual_seed(0)
    real, samples = torch.randn(30, 3, dtype=torch.float64), 0.7 * torch.randn(25, 3, dtype=torch.float64) + 0.5
    scores = {name: float(value) for name, value in manifold_scores(real, samples, 3).items()}
    assert scores == pytest.approx(by_hand(real, samples, 3))
    assert len(set(scores.values())) == 3
    with pytest.raises(ValueError, match="more than 5 pictures"):
        manifold_scores(real[:5], samples)


class Pixels(FeatureNetwork):
    num_features = 4

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)


def test_the_features_of_a_distance_tell_copies_of_one_picture_from_many() -> None:
    torch.manual_seed(0)
    distance = FrechetDistance("fd", Pixels(), "pixels")
    assert distance.diversity() == []
    real = torch.rand(40, 1, 2, 2)
    distance.set_reference(real.split(15))
    (diversity,) = distance.diversity()
    for batch in real.split(7):
        diversity.update(batch, torch.zeros(len(batch)))
    assert all(score == 1 for score in diversity.compute().values())
    diversity.reset()
    diversity.update(real[:1].expand(40, -1, -1, -1), torch.zeros(40))
    scores = diversity.compute()
    assert scores["precision"] == 1
    assert scores["recall"] == pytest.approx(1 / 40)
    assert scores["coverage"] < 0.5


def test_the_same_valid_square_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.tensor([[1, 2, 3], [2, 3, 1], [3, 1, 2]])
    second, wrong = first.flip(1), torch.ones(3, 3, dtype=torch.int64)
    squares = torch.stack([first, first, second, wrong])
    scores = LatinSquareScores(torch.nn.Identity(), order=3)  # type: ignore[arg-type]
    monkeypatch.setattr(scores, "read", lambda pixels: squares)
    (distinct,) = scores.diversity()
    distinct.update(torch.empty(4), squares[:, 1, 1] - 1)
    assert distinct.compute()["distinct"] == pytest.approx(2 / 3)

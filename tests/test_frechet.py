import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from elt_lightning.metrics.frechet import FrechetDistance, frechet_distance
from elt_lightning.metrics.moments import Moments
from elt_lightning.metrics.small_networks import FeatureNetwork


class FlatFeatures(FeatureNetwork):
    """Pictures of one row as features, unchanged."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features(pixels)


def random_pictures(count: int, num_features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    shift = torch.randn(num_features, generator=generator, dtype=torch.float64)
    features = torch.randn(count, num_features, generator=generator, dtype=torch.float64) @ mix + shift
    return features.view(count, 1, 1, num_features)


def metric_for(num_features: int, reference: Tensor | None = None) -> FrechetDistance:
    metric = FrechetDistance("fd_flat", FlatFeatures(num_features), "flat")
    if reference is not None:
        metric.set_reference(reference.split(70))
    return metric


def score(metric: FrechetDistance, *parts: Tensor) -> float:
    for part in parts:
        metric.update(part, torch.zeros(len(part), dtype=torch.long))
    return metric.compute()["fd_flat"].item()


def scipy_distance(first: Tensor, second: Tensor) -> float:
    a, b = first.flatten(1).numpy(), second.flatten(1).numpy()
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root.real))


@pytest.mark.parametrize("num_features", [2, 8, 33])
@pytest.mark.parametrize("seed", range(3))
def test_distance_equals_the_matrix_square_root_of_scipy(num_features: int, seed: int) -> None:
    real, fake = random_pictures(300, num_features, seed), random_pictures(250, num_features, seed + 100)
    ours = score(metric_for(num_features, real), *fake.split(64))
    assert ours == pytest.approx(scipy_distance(real, fake), rel=1e-9)
    assert score(metric_for(num_features, fake), real) == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize("num_features", [4, 24])
@pytest.mark.parametrize("seed", range(3))
def test_distance_equals_torchmetrics_own(num_features: int, seed: int) -> None:
    real, fake = random_pictures(300, num_features, seed), random_pictures(250, num_features, seed + 100)
    theirs = FrechetInceptionDistance(feature=FlatFeatures(num_features)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = score(metric_for(num_features, real), fake)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_distance_of_commuting_gaussians_has_its_closed_form(seed: int) -> None:
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    first, second = torch.rand(2, 6, dtype=torch.float64) * 5
    means = torch.randn(2, 6, dtype=torch.float64)
    # For covariances that share their axes: ‖μ₁ − μ₂‖² + Σ (σ₁ − σ₂)² over standard deviations.
    closed = sum((a - b) ** 2 for a, b in zip(*means.tolist(), strict=True))
    closed += sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(first.tolist(), second.tolist(), strict=True))
    moments = [Moments(m, (rotation * v) @ rotation.T) for m, v in zip(means, (first, second), strict=True)]
    assert frechet_distance(*moments).item() == pytest.approx(closed, rel=1e-10)


def test_distance_of_one_dimensional_and_of_degenerate_gaussians() -> None:
    def gaussian(mean: float, variance: float) -> Moments:
        return Moments(torch.tensor([mean], dtype=torch.float64), torch.tensor([[variance]], dtype=torch.float64))

    assert frechet_distance(gaussian(1, 4), gaussian(3, 9)).item() == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)
    assert frechet_distance(gaussian(1, 0), gaussian(3, 9)).item() == pytest.approx(4 + 9)


@pytest.mark.parametrize("seed", range(3))
def test_fewer_samples_than_features_still_give_a_finite_distance_close_to_scipys(seed: int) -> None:
    real, fake = random_pictures(300, 40, seed), random_pictures(12, 40, seed + 100)
    assert score(metric_for(40, real), fake) == pytest.approx(scipy_distance(real, fake), rel=1e-6)


def test_distance_of_a_set_to_itself_is_zero_and_never_negative() -> None:
    pictures = random_pictures(200, 16, 3)
    assert 0 <= score(metric_for(16, pictures), pictures) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 99])
def test_parts_give_the_same_moments_as_the_whole(size: int) -> None:
    pictures = random_pictures(200, 9, 1)
    whole, parts = metric_for(9), metric_for(9)
    whole.update(pictures, torch.empty(0))
    for part in pictures.split(size):
        parts.update(part, torch.empty(0))
    features = pictures.flatten(1).numpy()
    for metric in (whole, parts):
        moments = metric.moments()
        np.testing.assert_allclose(moments.mean.numpy(), features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features, rowvar=False), rtol=1e-10)


def test_ranks_merge_by_summing_their_states() -> None:
    real, fake = random_pictures(300, 9, 1), random_pictures(200, 9, 2)
    whole = score(metric_for(9, real), fake)
    first, second = metric_for(9, real), metric_for(9, real)
    first.update(fake[:37], torch.empty(0))
    second.update(fake[37:], torch.empty(0))
    first.merge_state(second)
    assert int(first.features_count) == 200
    assert first.compute()["fd_flat"].item() == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.float(),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.set_dtype(torch.float32),
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float32),
        lambda m: m.to(torch.float16),
        lambda m: nn.ModuleList([m]).to(torch.bfloat16)[0],
        lambda m: nn.ModuleList([m]).half()[0],
    ],
    ids=["float", "half", "bfloat16", "set_dtype", "cpu", "to32", "to16", "inside_to", "inside_half"],
)
def test_sums_stay_float64_whatever_is_asked(
    convert: Callable[[FrechetDistance], FrechetDistance],
) -> None:
    real, fake = random_pictures(300, 5, 1), random_pictures(200, 5, 2)
    expected = score(metric_for(5, real), fake)
    metric = metric_for(5, real)
    metric.update(fake[:100], torch.empty(0))
    metric = convert(metric)
    assert metric.features_total.dtype == metric.features_total_outer.dtype == torch.float64
    assert score(metric, fake[100:]) == pytest.approx(expected, rel=1e-10)
    metric.reset()
    assert metric.features_total.dtype == torch.float64
    assert score(metric, fake) == pytest.approx(expected, rel=1e-10)


def test_features_in_half_precision_are_summed_in_float64() -> None:
    pictures = random_pictures(5000, 3, 5).bfloat16()
    metric = metric_for(3)
    for part in pictures.split(500):
        metric.update(part, torch.empty(0))
    exact = pictures.flatten(1).double()
    np.testing.assert_allclose(metric.moments().mean.numpy(), exact.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(metric.moments().covariance.numpy(), exact.T.cov().numpy(), rtol=1e-10)


def test_reset_forgets_the_samples_and_keeps_the_reference() -> None:
    real, fake = random_pictures(300, 5, 1), random_pictures(200, 5, 2)
    metric = metric_for(5, real)
    first = score(metric, fake)
    metric.reset()
    assert int(metric.features_count) == 0
    assert score(metric, fake) == pytest.approx(first, rel=1e-12)


def test_a_metric_made_in_inference_mode_serves_outside_of_it() -> None:
    real, fake = random_pictures(300, 5, 1), random_pictures(200, 5, 2)
    with torch.inference_mode():
        metric = metric_for(5, real)
        inside = score(metric, fake)
        metric.reset()
    metric.reset()
    assert score(metric, fake) == pytest.approx(inside, rel=1e-12)


def test_copies_are_independent() -> None:
    real, fake = random_pictures(300, 5, 1), random_pictures(200, 5, 2)
    metric = metric_for(5, real)
    expected = score(metric_for(5, real), fake)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        metric.update(real, torch.empty(0))
        assert score(other, fake) == pytest.approx(expected, rel=1e-12)


def test_misuse_is_refused() -> None:
    metric = metric_for(5)
    with pytest.raises(ValueError, match="reference"):
        score(metric, random_pictures(10, 5, 0))
    with pytest.raises(ValueError, match="at least 2"):
        metric_for(5, random_pictures(1, 5, 0))
    with pytest.raises(ValueError, match="gave"):
        metric.update(random_pictures(10, 6, 0), torch.empty(0))

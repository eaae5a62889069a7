"""FID, sFID and Inception score of a small stand-in for the network, whose features can be worked out by hand."""

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from elt_lightning.errors import UserError
from elt_lightning.metrics import fid
from elt_lightning.metrics.fid import InceptionScores, fid_name
from elt_lightning.metrics.inception import FIDInception, InceptionFeatures
from elt_lightning.metrics.moments import Moments
from elt_lightning.metrics.reference import (
    InceptionMoments,
    ReferenceImages,
    compute_moments,
    load_or_compute,
    read_moments,
    write_moments,
)

POOL, SPATIAL, CLASSES = 7, 5, 11


class SmallInception(nn.Module):
    """Linear features of pictures (B, 3, 2, 2)."""

    num_pool, num_spatial, num_classes = POOL, SPATIAL, CLASSES

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(12, POOL + SPATIAL + CLASSES, generator=generator), requires_grad=False)
        self.sha256, self.calls = "0" * 64, 0

    def features(self, pixels: Tensor) -> InceptionFeatures:
        self.calls += 1
        return InceptionFeatures(*(pixels.flatten(1) @ self.mix).split([POOL, SPATIAL, CLASSES], dim=1))


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.rand(2, 3, 2, 2, generator=generator)
    return torch.rand(count, 3, 2, 2, generator=generator) * scale + shift


def arrays(network: SmallInception, images: Tensor) -> list[np.ndarray]:
    return [values.double().numpy() for values in network.features(images)]


def numpy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance by the eigenvalues of Σ₁Σ₂ itself, which is not symmetric."""
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real
    difference = first.mean(0) - second.mean(0)
    return float((difference**2).sum() + np.trace(one) + np.trace(two) - 2 * roots.sum())


def numpy_inception_score(logits: np.ndarray, split_size: int) -> float:
    """Mean over splits of exp of the mean divergence, sample by sample."""
    scores = []
    for start in range(0, len(logits), split_size):
        part = np.exp(logits[start : start + split_size])
        part /= part.sum(1, keepdims=True)
        marginal = part.mean(0)
        scores.append(math.exp(np.mean([sum(p * np.log(p / marginal)) for p in part])))
    return float(np.mean(scores))


def metric_for(real: Tensor | None = None, network: SmallInception | None = None) -> InceptionScores:
    network = network or SmallInception()
    moments = compute_moments(real.split(64), network) if real is not None else None
    return InceptionScores(network, moments)


def score(metric: InceptionScores, batches: Iterable[Tensor]) -> dict[str, float]:
    for batch in batches:
        metric.update(batch, torch.zeros(len(batch), dtype=torch.long))
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (2, "fid2"),
        (200, "fid200"),
        (999, "fid999"),
        (1000, "fid1k"),
        (1234, "fid1.234k"),
        (2000, "fid2k"),
        (2048, "fid2.048k"),
        (2500, "fid2.5k"),
        (10_000, "fid10k"),
        (49_999, "fid49.999k"),
        (50_000, "fid"),
        (100_000, "fid"),
    ],
)
def test_a_distance_of_few_samples_is_named_after_their_number(count: int, name: str) -> None:
    assert fid_name(count) == name
    assert fid_name(count, "sfid") == "s" + name


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_numpys(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "SPLIT_SIZE", 50)
    real, fake, network = pictures(150, seed), pictures(130, seed + 10), SmallInception(seed)
    scores = score(metric_for(real, network), fake.split(32))
    (real_pool, real_spatial, _), (pool, spatial, logits) = arrays(network, real), arrays(network, fake)
    assert scores == {
        "fid130": pytest.approx(numpy_distance(real_pool, pool), rel=1e-6),
        "sfid130": pytest.approx(numpy_distance(real_spatial, spatial), rel=1e-6),
        "inception_score": pytest.approx(numpy_inception_score(logits, 50), rel=1e-9),
    }
    assert scores["inception_score"] > 1.01


def test_fid_equals_torchmetrics_own() -> None:
    class Pool(nn.Module):
        num_features = POOL

        def forward(self, images: Tensor) -> Tensor:
            return network.features(images).pool.double()

    real, fake, network = pictures(400, 1), pictures(300, 2), SmallInception()
    theirs = FrechetInceptionDistance(feature=Pool()).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert score(metric_for(real, network), [fake])["fid300"] == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_inception_score_is_the_mean_over_splits_of_five_thousand() -> None:
    fake = torch.cat([pictures(5000, 1), pictures(5000, 2), pictures(1500, 3)])
    logits = arrays(SmallInception(), fake)[2]
    scores = score(metric_for(), fake.split(700))
    assert scores == {"inception_score": pytest.approx(numpy_inception_score(logits, 5000), rel=1e-9)}
    assert abs(scores["inception_score"] - numpy_inception_score(logits, len(fake))) > 0.01


@pytest.mark.parametrize("size", [1, 7, 120, 1000])
def test_scores_do_not_depend_on_batch_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "SPLIT_SIZE", 50)
    real, fake = pictures(100, 1), pictures(240, 2)
    expected = score(metric_for(real), [fake])
    assert score(metric_for(real), fake.split(size)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_do_not_depend_on_the_number_of_ranks(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "SPLIT_SIZE", 50)
    real, fake = pictures(100, 1), torch.cat([pictures(90, 2), pictures(110, 3)])
    expected = score(metric_for(real), [fake])
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(fid, "rank_and_world_size", lambda place=(rank, world_size): place)
        metric = metric_for(real)
        for batch in fake[rank::world_size].split(13):
            metric.update(batch, torch.empty(0))
        ranks.append(metric)
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    assert score(ranks[0], []) == pytest.approx(expected, rel=1e-6)


def test_each_batch_passes_through_the_network_once() -> None:
    metric = metric_for(pictures(50, 1))
    before = metric.network.calls
    score(metric, pictures(60, 2).split(20))
    assert metric.network.calls - before == 3


def test_what_the_reference_lacks_is_left_out() -> None:
    network = SmallInception()
    moments = compute_moments([pictures(50, 1)], network)
    metric = InceptionScores(network, InceptionMoments(moments.pool))
    assert set(score(metric, [pictures(40, 2)])) == {"fid40", "inception_score"}


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: nn.ModuleList([m]).float()[0], copy.deepcopy],
    ids=["half", "to", "inside_float", "copy"],
)
def test_sums_and_network_keep_their_precision(convert: Callable[[InceptionScores], InceptionScores]) -> None:
    real, fake = pictures(100, 1), pictures(80, 2)
    expected = score(metric_for(real), [fake])
    metric = metric_for(real)
    metric.update(fake[:30], torch.empty(0))
    metric = convert(metric)
    assert metric.network.mix.dtype == torch.float32
    assert score(metric, [fake[30:]]) == pytest.approx(expected, rel=1e-6)
    metric.reset()
    assert score(metric, [fake]) == pytest.approx(expected, rel=1e-6)


def test_too_few_and_too_many_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        score(metric_for(pictures(10, 1)), [pictures(1, 2)])
    monkeypatch.setattr(fid, "SPLIT_SIZE", 1)
    monkeypatch.setattr(fid, "MAX_SPLITS", 20)
    metric = metric_for()
    score(metric, [pictures(20, 1)])
    with pytest.raises(ValueError, match="at most 20 samples"):
        score(metric, [pictures(1, 1)])


def test_moments_of_images_equal_numpys_whatever_the_batches() -> None:
    images, network = pictures(90, 4), SmallInception()
    pool, spatial, _ = arrays(network, images)
    for size in (1, 32, 90):
        moments = compute_moments(images.split(size), network)
        assert moments.num_images == 90
        assert moments.spatial is not None
        for ours, features in ((moments.pool, pool), (moments.spatial, spatial)):
            np.testing.assert_allclose(ours.mean.numpy(), features.mean(0), rtol=1e-6)
            np.testing.assert_allclose(ours.covariance.numpy(), np.cov(features, rowvar=False), rtol=1e-4, atol=1e-7)
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        compute_moments([images[:1]], network)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of moments be of the stand-in's sizes."""
    monkeypatch.setattr(FIDInception, "num_pool", POOL)
    monkeypatch.setattr(FIDInception, "num_spatial", SPATIAL)


def random_moments(seed: int) -> InceptionMoments:
    return compute_moments([pictures(40, seed)], SmallInception())


def same(first: Moments | None, second: Moments | None) -> bool:
    assert first is not None
    assert second is not None
    assert second.mean.dtype == second.covariance.dtype == torch.float64
    return torch.equal(first.mean, second.mean) and torch.equal(first.covariance, second.covariance)


@pytest.mark.usefixtures("small_files")
def test_moments_survive_a_file(tmp_path: Path) -> None:
    moments = random_moments(1)
    write_moments(tmp_path / "stats.npz", moments)
    again = read_moments(tmp_path / "stats.npz")
    assert same(moments.pool, again.pool)
    assert same(moments.spatial, again.spatial)
    assert again.num_images == 40
    write_moments(tmp_path / "stats.npz", InceptionMoments(moments.pool))
    again = read_moments(tmp_path / "stats.npz")
    assert same(moments.pool, again.pool)
    assert (again.spatial, again.num_images) == (None, None)


@pytest.mark.usefixtures("small_files")
def test_a_reference_batch_of_the_adm_evaluator_is_read(tmp_path: Path) -> None:
    moments = random_moments(2)
    assert moments.spatial is not None
    np.savez(
        tmp_path / "batch.npz",
        arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8),
        mu=moments.pool.mean.float().numpy(),
        sigma=moments.pool.covariance.numpy(),
        mu_s=moments.spatial.mean.numpy(),
        sigma_s=moments.spatial.covariance.numpy(),
    )
    again = read_moments(tmp_path / "batch.npz")
    assert torch.equal(again.pool.mean, moments.pool.mean.float().double())
    assert same(moments.spatial, again.spatial)


@pytest.mark.usefixtures("small_files")
def test_wrong_files_are_refused_in_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"

    def complaint() -> str:
        with pytest.raises(UserError, match=r"stats\.npz") as caught:
            read_moments(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    mean, covariance = np.zeros(POOL), np.eye(POOL)
    assert "do not exist: `elt stats` makes them" in complaint()
    for content in (b"", b"not an archive", b"PK\x03\x04 half of one"):
        path.write_bytes(content)
        assert "is not a NumPy .npz file" in complaint()
    with path.open("wb") as file:
        np.save(file, mean)
    assert "is not a NumPy .npz file" in complaint()
    np.savez(path, mu=np.array([{}], dtype=object), sigma=covariance)
    assert "is not a NumPy .npz file of plain arrays" in complaint()
    np.savez(path, arr_0=mean, labels=mean)
    assert "needs mu and sigma, and has arr_0, labels" in complaint()
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    assert "have shapes (64,) and (64, 64), not (7,) and (7, 7)" in complaint()
    np.savez(path, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    assert "mu_s and sigma_s have shapes" in complaint()
    for wrong in (np.nan, np.inf):
        np.savez(path, mu=mean, sigma=np.full_like(covariance, wrong))
        assert "not finite" in complaint()
    np.savez(path, mu=mean, sigma=covariance + np.triu(np.ones((POOL, POOL))))
    assert "sigma is not symmetric" in complaint()
    correlated = covariance.copy()  # its variances are 1, but that of the difference of the first two is -1
    correlated[0, 1] = correlated[1, 0] = 1.5
    for negative in (-covariance, correlated):
        np.savez(path, mu=mean, sigma=negative)
        assert "sigma has variances below 0" in complaint()
    few = np.random.default_rng(0).normal(size=(3, POOL)).astype(np.float32)
    np.savez(path, mu=mean, sigma=np.cov(few, rowvar=False).astype(np.float32))  # of rank 2: rounding is no fault
    read_moments(path)


@pytest.mark.usefixtures("small_files")
def test_moments_of_images_are_computed_once_for_each_content_weights_and_settings(tmp_path: Path) -> None:
    passes = 0

    def images(fingerprint: str, seed: int, **settings: int) -> ReferenceImages:
        def batches() -> Iterable[Tensor]:
            nonlocal passes
            passes += 1
            return [pictures(40, seed)]

        return ReferenceImages(batches, fingerprint, settings)

    network = SmallInception()
    first = load_or_compute(images("a", 1, size=256), network, tmp_path)
    assert same(random_moments(1).pool, first.pool)
    again = load_or_compute(images("a", 2, size=256), network, tmp_path)
    assert (passes, same(first.pool, again.pool)) == (1, True)
    other = SmallInception()
    other.sha256 = "1" * 64
    for source, reader in ((images("b", 2, size=256), network), (images("a", 3, size=128), network)):
        assert not same(first.pool, load_or_compute(source, reader, tmp_path).pool)
    load_or_compute(images("a", 1, size=256), other, tmp_path)
    assert (passes, len(list(tmp_path.iterdir()))) == (4, 4)


@pytest.mark.usefixtures("small_files")
def test_a_pass_that_breaks_off_leaves_no_cached_file(tmp_path: Path) -> None:
    def batches() -> Iterable[Tensor]:
        yield pictures(4, 1)
        raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        load_or_compute(ReferenceImages(batches, "a"), SmallInception(), tmp_path)
    assert not list(tmp_path.iterdir())

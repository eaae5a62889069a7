"""FVD and Inception score of clips, with small TorchScript files in the place of I3D and C3D."""

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from video_networks import SmallC3D, SmallI3D, write_network

from elt_lightning.errors import UserError
from elt_lightning.metrics import fid
from elt_lightning.metrics.base import scored_as
from elt_lightning.metrics.c3d import C3D
from elt_lightning.metrics.fvd import RealClips, VideoScores, build_video_scores, load_or_compute_real
from elt_lightning.metrics.i3d import I3D
from elt_lightning.metrics.reference import ReferenceImages
from elt_lightning.metrics.video_protocols import PROTOCOLS, VideoProtocol, Window, video_protocol
from elt_lightning.tokenizers.base import to_bytes

SMALL = VideoProtocol("small", num_real=40, num_fakes=30, repeats=1, split="train", windows="any", inception_splits=4)


def clips(count: int, seed: int, frames: int = 16, channels: int = 3) -> Tensor:
    """Clips (count, channels, frames, 12, 10) of smooth noise; brightness and contrast follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.rand(2, generator=generator).sort().values
    noise = torch.rand(count, channels, 4, 3, 3, generator=generator)
    return low + (high - low) * F.interpolate(noise, size=(frames, 12, 10), mode="trilinear")


@pytest.fixture(scope="session")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "i3d_torchscript.pt", SmallI3D())


@pytest.fixture(scope="session")
def c3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "c3d_ucf101.pt", SmallC3D())


@pytest.fixture
def i3d(i3d_file: Path) -> I3D:
    return I3D.load(i3d_file)


@pytest.fixture
def c3d(c3d_file: Path) -> C3D:
    return C3D.load(c3d_file)


def numpy_distance(first: np.ndarray, second: np.ndarray, unbiased: bool = True) -> float:
    """Fréchet distance by singular values: tr (Σ₁Σ₂)^½ is the nuclear norm of AᵀB where Σ₁ = A·Aᵀ and Σ₂ = B·Bᵀ."""
    centred = [(values - values.mean(0)) / math.sqrt(len(values) - unbiased) for values in (first, second)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(means + sum((values**2).sum() for values in centred) - 2 * roots)


def numpy_inception_score(probabilities: np.ndarray, splits: int) -> float:
    """Sample i is in part i mod splits."""
    scores = []
    for part in (probabilities[start::splits] for start in range(splits)):
        divergences = [(p * np.log(p / part.mean(0))).sum() for p in part]
        scores.append(math.exp(np.mean(divergences)))
    return float(np.mean(scores))


def real_moments(network: I3D, real: Tensor, protocol: VideoProtocol, folder: Path) -> RealClips:
    source = ReferenceImages(lambda: real.split(7), f"{real.sum().item()} {tuple(real.shape)}")
    return load_or_compute_real(protocol, source, network, folder)


def score(metric: VideoScores, batches: Iterable[Tensor]) -> dict[str, float]:
    for batch in batches:
        metric.update(batch, torch.zeros(len(batch), dtype=torch.long))
    return {name: value.item() for name, value in metric.compute().items()}


# The networks.


def test_i3d_gets_bytes_and_the_published_arguments(i3d: I3D, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = clips(5, 1)
    expected = SmallI3D()(to_bytes(pixels), rescale=True, resize=True, return_features=True)
    features = i3d.features(pixels)
    assert features.shape == (5, 400)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(i3d.features(to_bytes(pixels)), features)
    monkeypatch.setattr("elt_lightning.metrics.i3d.AT_ONCE", 2)
    torch.testing.assert_close(i3d.features(pixels), features, rtol=1e-5, atol=1e-5)


def test_i3d_reads_clips_that_were_resized_as_tensorflow_1_did(i3d: I3D) -> None:
    pixels = clips(2, 3)
    frames = to_bytes(pixels).float().transpose(1, 2).flatten(0, 1)
    rows, columns = (torch.arange(224) * (size / 224) / (size - 1) * 2 - 1 for size in frames.shape[2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).expand(len(frames), -1, -1, -1)
    resized = F.grid_sample(frames, grid, padding_mode="border", align_corners=True)
    resized = resized.unflatten(0, (2, 16)).transpose(1, 2) / 127.5 - 1
    expected = SmallI3D()(resized, return_features=True).detach()
    torch.testing.assert_close(i3d.features(pixels, tensorflow_resize=True), expected, rtol=1e-3, atol=1e-3)
    assert (i3d.features(pixels) - expected).abs().max() > 0.01


def test_grey_clips_are_read_as_colour(i3d: I3D, c3d: C3D) -> None:
    grey = clips(3, 2, channels=1)
    torch.testing.assert_close(i3d.features(grey), i3d.features(grey.expand(-1, 3, -1, -1, -1)))
    torch.testing.assert_close(c3d.probabilities(grey), c3d.probabilities(grey.expand(-1, 3, -1, -1, -1)))


def test_c3d_gets_bytes_and_gives_probabilities(c3d: C3D) -> None:
    pixels = clips(20, 2)
    expected = SmallC3D()(to_bytes(pixels)).detach()
    torch.testing.assert_close(c3d.probabilities(pixels), expected, rtol=1e-4, atol=1e-6)


def test_autocast_changes_no_features(i3d: I3D) -> None:
    pixels = clips(3, 1)
    expected = i3d.features(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(i3d.features(pixels), expected)


def test_a_network_is_named_by_its_file(i3d: I3D, monkeypatch: pytest.MonkeyPatch) -> None:
    assert i3d.name == f"I3D of another file ({i3d.sha256[:8]})"
    monkeypatch.setattr(I3D, "published_sha256", i3d.sha256)
    assert i3d.name == "I3D"


@pytest.mark.parametrize("network", [I3D, C3D])
def test_wrong_files_are_refused_in_one_clear_line(network: type[I3D] | type[C3D], tmp_path: Path) -> None:
    path = tmp_path / "network.pt"

    def complaint() -> str:
        with pytest.raises(UserError, match=r"network\.pt") as caught:
            network.load(path)
        assert "\n" not in str(caught.value)
        assert network.url in str(caught.value)
        assert network.setting in str(caught.value)
        return str(caught.value)

    assert "does not exist" in complaint()
    path.write_bytes(b"not a network")
    assert "is not a TorchScript file" in complaint()
    torch.save({"weight": torch.zeros(2)}, path)
    assert "is not a TorchScript file" in complaint()


def test_files_of_other_networks_are_refused(i3d_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes self, x, not rescale, resize, return_features, so it is another"):
        I3D.load(write_network(tmp_path / "c3d.pt", SmallC3D()))
    other = I3D.load(write_network(tmp_path / "i3d.pt", SmallI3D(num_features=1024)))
    with pytest.raises(UserError, match=r"I3D gave \(2, 1024\), not \(2, 400\), so its file is that of another"):
        other.features(clips(2, 1))
    with pytest.raises(UserError, match=r"C3D gave \(2, 400\), not \(2, 101\)"):
        C3D.load(i3d_file).probabilities(clips(2, 1))

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().mean((1, 2, 3, 4))[:, None].expand(-1, 101)

    with pytest.raises(UserError, match="no probabilities"):
        C3D.load(write_network(tmp_path / "logits.pt", Logits())).probabilities(clips(2, 1))


def test_clips_of_the_wrong_length_or_shape_are_refused(i3d: I3D, c3d: C3D) -> None:
    assert i3d.features(clips(2, 1, frames=9)).shape == (2, 400)
    with pytest.raises(UserError, match="at least 9 frames, not 8"):
        i3d.features(clips(2, 1, frames=8))
    with pytest.raises(UserError, match="clips of 16 frames, not 17"):
        c3d.probabilities(clips(2, 1, frames=17))
    with pytest.raises(ValueError, match=r"clips are \(B, 3 or 1, F, H, W\)"):
        i3d.features(torch.zeros(2, 3, 32, 32))


# The protocols.


def test_protocols_are_those_of_their_sources() -> None:
    table = {
        name: (p.num_real, p.num_fakes, p.repeats, p.frames, p.stride, p.split, p.unbiased, p.inception_splits)
        for name, p in PROTOCOLS.items()
    }
    assert table == {
        "styleganv-2048": (2048, 2048, 1, 16, 1, "all", False, 10),
        "tats-2048": (2048, 2048, 1, 16, 1, "train", True, 1),
        "magvit-10k×4": (10_000, 10_000, 4, 16, 1, "train", True, 1),
    }
    assert video_protocol("magvit-10kx4") is video_protocol("magvit-10k×4") is PROTOCOLS["magvit-10k×4"]
    with pytest.raises(UserError, match="no protocol fvd of FVD: choose one of styleganv-2048, tats-2048, magvit"):
        video_protocol("fvd")


def check_windows(protocol: VideoProtocol, lengths: Sequence[int], windows: Sequence[Window]) -> None:
    span = (protocol.frames - 1) * protocol.stride + 1
    for video, start in windows:
        assert 0 <= start <= lengths[video] - span


@pytest.mark.parametrize("stride", [1, 2])
def test_one_window_of_each_video(stride: int) -> None:
    protocol = replace(SMALL, windows="one of each video", frames=4, stride=stride, num_real=50)
    lengths = [9 + video % 5 for video in range(100)] + [3] * 20
    chosen = protocol.choose(lengths)
    check_windows(protocol, lengths, chosen)
    assert len(chosen) == len({video for video, _ in chosen}) == 50
    assert chosen == protocol.choose(lengths)
    assert chosen != replace(protocol, seed=1).choose(lengths)
    assert len(replace(protocol, num_real=1000).choose(lengths)) == 100
    starts = Counter(start for seed in range(30) for _, start in replace(protocol, seed=seed).choose([16] * 50))
    assert sorted(starts) == list(range(16 - 3 * stride))


def test_videos_are_used_again_when_each_has_given_a_window() -> None:
    protocol = replace(SMALL, windows="again", frames=4, num_real=250)
    lengths = [20] * 100 + [3]
    chosen = protocol.choose(lengths)
    check_windows(protocol, lengths, chosen)
    counts = Counter(video for video, _ in chosen)
    assert sorted(counts.values()) == [2] * 50 + [3] * 50
    assert len(set(chosen)) > 230  # another window each time


def test_any_window_is_as_likely_and_none_comes_twice() -> None:
    protocol = replace(SMALL, windows="any", frames=4, num_real=10_000)
    lengths = [4, 10, 2, 7, 3, 30]
    everything = [Window(video, start) for video, n in enumerate(lengths) for start in range(max(n - 3, 0))]
    assert sorted(protocol.choose(lengths)) == everything
    chosen = replace(protocol, num_real=12).choose(lengths)
    assert len(set(chosen)) == 12
    assert set(chosen) < set(everything)


@pytest.mark.parametrize("windows", ["one of each video", "again", "any"])
@pytest.mark.parametrize("lengths", [[], [15, 3]])
def test_too_few_real_videos_are_refused(windows: str, lengths: list[int]) -> None:
    with pytest.raises(UserError, match="real videos of at least 16 frames: 0 of"):
        replace(SMALL, windows=windows).choose(lengths)


# The scores.


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "magvit-10k×4" else n for n in PROTOCOLS]
)
def test_scores_equal_numpys(name: str, i3d: I3D, c3d: C3D, tmp_path: Path) -> None:
    protocol = replace(PROTOCOLS[name], num_real=40, num_fakes=30)
    real, fakes = clips(40, 0), clips(30, 10)
    metric = VideoScores(protocol, i3d, real_moments(i3d, real, protocol, tmp_path), c3d)
    features = [i3d.features(x, protocol.tensorflow_resize).double().numpy() for x in (real, fakes)]
    probabilities = c3d.probabilities(fakes).double().numpy()
    assert score(metric, fakes.split(11)) == {
        "fvd": pytest.approx(numpy_distance(*features, unbiased=protocol.unbiased), rel=1e-5),
        "inception_score": pytest.approx(numpy_inception_score(probabilities, protocol.inception_splits), rel=1e-6),
    }
    assert metric.feature_network == f"{i3d.name} and C3D, protocol {name}"


@pytest.mark.parametrize(
    ("num_real", "num_fakes", "name", "network"),
    [
        (40, 30, "fvd", "protocol small"),
        (40, 24, "fvd24", "protocol small"),
        (40, 31, "fvd31", "protocol small"),
        (39, 30, "fvd30", "protocol small with 39 real clips"),
    ],
)
def test_a_plain_fvd_is_of_the_protocols_numbers(
    num_real: int, num_fakes: int, name: str, network: str, i3d: I3D, tmp_path: Path
) -> None:
    metric = VideoScores(SMALL, i3d, real_moments(i3d, clips(num_real, 1), SMALL, tmp_path))
    scores = score(metric, [clips(num_fakes, 2)])
    assert list(scores) == [name]
    assert scored_as("fvd", list(scores)) == name
    assert metric.feature_network == f"{i3d.name}, {network}"


def test_each_score_needs_its_network(c3d: C3D, i3d: I3D) -> None:
    metric = VideoScores(SMALL, c3d=c3d)
    assert list(score(metric, [clips(9, 1)])) == ["inception_score"]
    assert metric.feature_network == "C3D, protocol small"
    for networks in ({}, {"i3d": i3d}, {"i3d": i3d, "c3d": c3d}):
        with pytest.raises(ValueError, match="needs I3D with the moments of real clips, or C3D"):
            VideoScores(SMALL, **networks)


def test_scores_depend_neither_on_batches_nor_on_ranks(
    i3d: I3D, c3d: C3D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = torch.cat([clips(20, 2), clips(17, 3)])
    real = real_moments(i3d, clips(40, 1), SMALL, tmp_path)
    expected = score(VideoScores(SMALL, i3d, real, c3d), [fakes])
    for size in (1, 5):
        assert score(VideoScores(SMALL, i3d, real, c3d), fakes.split(size)) == pytest.approx(expected, rel=1e-6)
    ranks = []
    for rank in range(3):
        monkeypatch.setattr(fid, "rank_and_world_size", lambda place=(rank, 3): place)
        ranks.append(VideoScores(SMALL, i3d, real, c3d))
        for batch in fakes[rank::3].split(4):
            ranks[-1].update(batch, torch.empty(0))
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    assert score(ranks[0], []) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu"), copy.deepcopy],
    ids=["half", "bfloat16", "cpu", "copy"],
)
def test_sums_and_networks_keep_their_precision(
    convert: Callable[[VideoScores], VideoScores], i3d_file: Path, c3d: C3D, tmp_path: Path
) -> None:
    i3d, fakes = I3D.load(i3d_file), clips(20, 2)
    metric = VideoScores(SMALL, i3d, real_moments(i3d, clips(40, 1), SMALL, tmp_path), c3d)
    expected = score(metric, [fakes])
    metric.reset()
    metric.update(fakes[:9], torch.empty(0))
    metric = convert(metric)
    assert {parameter.dtype for parameter in metric.i3d.parameters()} == {torch.float32}
    assert score(metric, [fakes[9:]]) == pytest.approx(expected, rel=1e-6)


# The real clips.


def test_moments_of_real_clips_are_computed_once_for_each_content_network_and_protocol(
    i3d: I3D, tmp_path: Path
) -> None:
    passes = 0

    def source(fingerprint: str, seed: int, **settings: int) -> ReferenceImages:
        def batches() -> Iterable[Tensor]:
            nonlocal passes
            passes += 1
            return clips(20, seed).split(6)

        return ReferenceImages(batches, fingerprint, settings)

    def compute(source: ReferenceImages, network: I3D = i3d, protocol: VideoProtocol = SMALL) -> Tensor:
        real = load_or_compute_real(protocol, source, network, tmp_path)
        assert real.count == 20
        assert real.moments.mean.dtype == real.moments.covariance.dtype == torch.float64
        return real.moments.covariance

    first = compute(source("a", 1, size=128))
    np.testing.assert_allclose(
        first.numpy(), np.cov(i3d.features(clips(20, 1)).double().numpy(), rowvar=False), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(compute(source("a", 2, size=128)), first)  # not read again
    assert passes == 1
    other = copy.deepcopy(i3d)
    other.sha256 = "1" * 64
    compute(source("b", 1, size=128))
    compute(source("a", 1, size=64))
    compute(source("a", 1, size=128), other)
    biased = compute(source("a", 1, size=128), protocol=replace(SMALL, unbiased=False))
    torch.testing.assert_close(biased, first * 19 / 20)
    compute(source("a", 1, size=128), protocol=replace(SMALL, seed=1))
    assert (passes, len(list(tmp_path.iterdir()))) == (6, 6)


def test_a_pass_that_breaks_off_leaves_no_cached_file(i3d: I3D, tmp_path: Path) -> None:
    def batches() -> Iterable[Tensor]:
        yield clips(4, 1)
        raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        load_or_compute_real(SMALL, ReferenceImages(batches, "a"), i3d, tmp_path)
    with pytest.raises(UserError, match="at least 2 real clips, not 1"):
        load_or_compute_real(SMALL, ReferenceImages(lambda: [clips(1, 1)], "a"), i3d, tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_are_built_of_the_files_that_are_given(i3d_file: Path, c3d_file: Path, tmp_path: Path) -> None:
    source = ReferenceImages(lambda: clips(40, 1).split(9), "a")
    both = build_video_scores(SMALL, source, tmp_path, i3d_file, c3d_file)
    assert list(score(both, [clips(30, 2)])) == ["fvd", "inception_score"]
    assert list(score(build_video_scores(SMALL, source, tmp_path, i3d_file), [clips(30, 2)])) == ["fvd"]
    only = build_video_scores(SMALL, source, tmp_path, c3d_path=c3d_file)
    assert list(score(only, [clips(30, 2)])) == ["inception_score"]
    with pytest.raises(UserError, match="FVD needs I3D, the Inception score C3D") as caught:
        build_video_scores(SMALL, source, tmp_path)
    for text in ("i3d_torchscript.pt", "c3d_ucf101.pt", "dropbox.com", "i3d_path", "c3d_path"):
        assert text in str(caught.value)


@pytest.mark.skipif("ELT_I3D" not in os.environ, reason="ELT_I3D names no i3d_torchscript.pt")
def test_published_i3d_tells_black_from_white() -> None:
    network = I3D.load(os.environ["ELT_I3D"])
    assert network.name == "I3D"
    black, white = (torch.full((8, 3, 30, 64, 64), value, dtype=torch.uint8) for value in (0, 255))
    for resize in (False, True):
        features = [network.features(clips, resize).double().numpy() for clips in (black, white)]
        assert numpy_distance(*features) == pytest.approx(151.26, abs=0.15)

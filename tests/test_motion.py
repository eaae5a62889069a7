"""The network that names motions, on blobs that move over a torus."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from elt_lightning.metrics import motion
from elt_lightning.metrics.digits import RecognisedShare
from elt_lightning.metrics.motion import (
    BLURS,
    MotionNetwork,
    blurred,
    load_or_train_motion_network,
    motion_metrics,
    train_motion_network,
)


def moving_blobs(count: int, seed: int, frames: int = 8, side: int = 32) -> tuple[Tensor, Tensor]:
    """Clips (count, 1, frames, side, side) uint8 and their motions: eight directions, resting, growing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    time = torch.arange(frames)[None, :]
    angle, moves = labels[:, None] * torch.pi / 4, (labels < 8)[:, None]
    speed = (0.8 + 0.6 * torch.rand(count, 1, generator=generator)) * side / 32
    start = torch.rand(2, count, 1, generator=generator) * side
    row, column = (start[0] + moves * speed * time * angle.sin(), start[1] + moves * speed * time * angle.cos())
    growth = 1 + (labels == 9)[:, None] * time / frames
    radius = growth * side / 32 * (3 + torch.rand(count, 1, generator=generator))
    places = torch.arange(side)

    def offset(centre: Tensor) -> Tensor:
        return (places - centre[..., None] + side / 2) % side - side / 2  # count, frames, side

    distance = offset(row)[..., None] ** 2 + offset(column)[..., None, :] ** 2
    brightness = 155 + 100 * torch.rand(count, 1, 1, 1, generator=generator)
    return ((distance < radius[..., None, None] ** 2) * brightness).to(torch.uint8).unsqueeze(1), labels


pytestmark = pytest.mark.slow  # the network is trained once, half a minute


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MotionNetwork, Path]:
    path = tmp_path_factory.mktemp("motion") / "network.safetensors"
    return load_or_train_motion_network(path, *moving_blobs(1000, 0), *moving_blobs(200, 1)), path


@pytest.mark.parametrize(("frames", "side"), [(8, 32), (16, 32), (8, 64), (12, 48)])
def test_it_names_motions_at_other_lengths_and_sizes(
    trained: tuple[MotionNetwork, Path], frames: int, side: int
) -> None:
    clips, labels = moving_blobs(200, 2, frames, side)
    assert (trained[0](clips).argmax(1) == labels).float().mean() > 0.9


def test_bytes_floats_and_colours_read_the_same(
    trained: tuple[MotionNetwork, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, clips = trained[0], moving_blobs(20, 3)[0]
    features = network.features(clips)
    assert features.shape == (20, 64)
    assert not features.requires_grad
    torch.testing.assert_close(network.features(clips / 255), features)
    torch.testing.assert_close(network.features((clips / 255).expand(-1, 3, -1, -1, -1)), features)
    monkeypatch.setattr(motion, "AT_ONCE", 7)
    torch.testing.assert_close(network.features(clips), features, rtol=1e-4, atol=1e-5)


def test_a_trained_network_is_read_from_its_file(
    trained: tuple[MotionNetwork, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(motion, "train_motion_network", refuse)
    nothing = torch.empty(0)
    again = load_or_train_motion_network(trained[1], nothing, nothing, nothing, nothing)
    assert not again.training
    for name, tensor in trained[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_training_follows_from_its_seed_and_leaves_the_global_one_alone() -> None:
    clips, labels = moving_blobs(40, 0)
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(networks))
        before = torch.get_rng_state()
        networks.append(MotionNetwork())
        torch.set_rng_state(before)
        with torch.inference_mode():
            train_motion_network(networks[-1], clips, labels, steps=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
    first, second, third = (torch.cat([p.flatten() for p in network.parameters()]) for network in networks)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_recognised_is_the_share_of_the_asked_motions(trained: tuple[MotionNetwork, Path]) -> None:
    clips, labels = moving_blobs(60, 4)
    read = trained[0](clips).argmax(1)
    asked = labels.where(torch.arange(60) < 45, (labels + 1) % 10)
    metric = RecognisedShare(trained[0])
    assert torch.equal(metric.correct(clips / 255, asked), read == asked)
    for places in torch.arange(60).split(25):
        metric.update(clips[places] / 255, asked[places])
    assert metric.compute() == {"recognised": pytest.approx((read == asked).float().mean().item())}
    assert metric.compute()["recognised"] == pytest.approx(0.75, abs=0.1)


def test_fd_motion_is_small_for_the_same_motions_and_large_for_others(trained: tuple[MotionNetwork, Path]) -> None:
    network, real = trained[0], moving_blobs(400, 5)[0]
    recognised, distance = motion_metrics(network, real.split(150))
    assert isinstance(recognised, RecognisedShare)
    assert distance.feature_network == "motion_network"

    def score(clips: Tensor) -> float:
        distance.reset()
        for part in (clips / 255).split(90):
            distance.update(part, torch.empty(0))
        scores = distance.compute()
        assert list(scores) == ["fd_motion"]
        return scores["fd_motion"].item()

    others = moving_blobs(400, 6)[0]
    still = others[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert score(real) == pytest.approx(0, abs=1e-6)
    assert 20 * score(others) < score(still)
    first, second = (network.features(clips).double().numpy() for clips in (real, others))
    centred = [(values - values.mean(0)) / np.sqrt(len(values) - 1) for values in (first, second)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + sum((c**2).sum() for c in centred) - 2 * roots
    assert score(others) == pytest.approx(expected, rel=1e-4)


def test_blurs_are_averages_and_leave_what_is_even_alone() -> None:
    clips = torch.rand(4, 3, 8, 12, 12)
    found = blurred(clips, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(found[0], clips[0])
    for clip, result, (frames, side) in zip(clips[1:], found[1:], BLURS[1:], strict=True):
        around = clip[
            :, 4 - frames // 2 : 5 + frames // 2, 6 - side // 2 : 7 + side // 2, 6 - side // 2 : 7 + side // 2
        ]
        torch.testing.assert_close(result[:, 4, 6, 6], around.mean((1, 2, 3)))
    even = torch.full((4, 1, 8, 12, 12), 0.3)
    torch.testing.assert_close(blurred(even, torch.arange(4)), even)


def test_brightness_changes_nothing(trained: tuple[MotionNetwork, Path]) -> None:
    network, clips = trained[0], 0.5 * moving_blobs(20, 3)[0] / 255
    torch.testing.assert_close(network.features(clips), network.features(clips + 0.3), atol=1e-3, rtol=1e-3)
    assert network.features(torch.zeros(1, 1, 8, 32, 32)).isfinite().all()

"""Clips of UCF-101's layout: the right moments of the right videos, in an order that can be resumed."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from video_files import CLASSES, break_video, numbers_of, video_name, video_of, write_lines, write_ucf101

from elt_lightning.data.base import HeldOutOrder
from elt_lightning.data.clip_batches import ClipBatch, ClipLoader, ClipRequest, FixedClips, TrainingClips
from elt_lightning.data.clips import ClipShape, Video, fixed_start, resize_and_crop
from elt_lightning.data.decoding import BrokenClipError, num_frames
from elt_lightning.data.ucf101 import UCF101DataModule, list_videos, read_classes
from elt_lightning.errors import UserError

LENGTHS = [20 + 3 * number for number in range(12)]
SHAPE = ClipShape(num_frames=6, size=64)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_ucf101(tmp_path_factory.mktemp("ucf101"), LENGTHS)


@pytest.fixture
def own_layout(tmp_path: Path) -> tuple[Path, Path]:
    """One that a test may damage."""
    return write_ucf101(tmp_path, [20] * 12)


@pytest.fixture
def videos(layout: tuple[Path, Path]) -> list[Video]:
    return list_videos(*layout, "all", val=False)


def number_of(video: Video) -> int:
    (number,) = (number for number in range(12) if video_name(number) == video.name)
    return number


def request(*places: int, epoch: int = 0) -> ClipRequest:
    return ClipRequest(list(places), epoch)


# ---- lists ----


def test_lists_are_read_as_they_are_published(layout: tuple[Path, Path]) -> None:
    assert read_classes(layout[1]) == CLASSES
    training, val = (list_videos(*layout, 1, val) for val in (False, True))
    assert {number_of(video) for video in training} == {0, 1, 3, 4, 6, 7, 9, 10}
    assert {number_of(video) for video in val} == {2, 5, 8, 11}
    for video in training + val:
        assert CLASSES[video.label] == Path(video.path).parent.name
        assert Path(video.path) == layout[0] / video.name
    assert training == sorted(training)


def test_all_takes_every_video(layout: tuple[Path, Path]) -> None:
    for val in (False, True):
        assert len({number_of(video) for video in list_videos(*layout, "all", val)}) == 12


def test_lists_and_names_may_come_from_windows(own_layout: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    root, lists = own_layout
    before = {val: list_videos(root, lists, 1, val) for val in (False, True)}
    for path in lists.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for number in (0, 2):
        (root / video_name(number)).rename((root / video_name(number)).with_suffix(".AVI"))
    assert read_classes(lists) == CLASSES
    for val, videos in before.items():
        found = list_videos(root, lists, 1, val)
        assert [(video.name, video.label) for video in found] == [(video.name, video.label) for video in videos]
        assert all(Path(video.path).is_file() for video in found)
    assert caplog.messages == []
    (root / video_name(5)).rename((root / video_name(5)).with_suffix(".mp4"))
    assert len(list_videos(root, lists, "all", val=False)) == 11
    assert caplog.messages == [f"left out of {root}, as no .avi: 1 .mp4"]


@pytest.mark.parametrize(
    ("spoil", "split", "telling"),
    [
        (lambda root, lists: (lists / "trainlist01.txt").unlink(), 1, r"trainlist01\.txt cannot be read.*ucf"),
        (lambda root, lists: (lists / "classInd.txt").unlink(), "all", r"classInd\.txt cannot be read"),
        (lambda root, lists: None, 2, r"trainlist02\.txt cannot be read"),
        (
            lambda root, lists: (root / video_name(4)).unlink(),
            1,
            r"1 of the 8 videos of .*trainlist01.*Biking/v_Biking_",
        ),
        (lambda root, lists: root.rename(root.with_name("gone")), 1, "UCF-101 cannot be read"),
        (lambda root, lists: write_lines(lists / "trainlist01.txt", ["Yo/v.avi 1"]), 1, "Yo/v.avi is of a class"),
        (lambda root, lists: write_lines(lists / "trainlist01.txt", []), 1, "has no videos"),
        (
            lambda root, lists: write_lines(lists / "trainlist01.txt", ["Yo/v.avi 1", "Yo/v.AVI 1"]),
            1,
            "trainlist01.txt has 1 videos more than once, such as Yo/v.avi",
        ),
        (
            lambda root, lists: [(root / "Biking" / name).touch() for name in ("v.avi", "v.AVI")],
            1,
            "has 1 videos more than once, such as Biking/v.avi",
        ),
        (lambda root, lists: write_lines(lists / "classInd.txt", ["0 A", "1 B"]), 1, "number classes from 1"),
        (lambda root, lists: write_lines(lists / "classInd.txt", ["1 A", "2"]), 1, "a number and a name"),
        (lambda root, lists: write_lines(lists / "classInd.txt", ["1 Biking"]), "all", "is of a class"),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line(
    own_layout: tuple[Path, Path], spoil: Callable[[Path, Path], Any], split: Any, telling: str
) -> None:
    spoil(*own_layout)
    with pytest.raises(UserError, match=telling) as refusal:
        list_videos(*own_layout, split, val=False)
    assert "\n" not in str(refusal.value)


# ---- clips ----


@pytest.mark.parametrize("stride", [1, 3])
def test_training_clips_are_runs_of_frames_from_moments_that_change(videos: list[Video], stride: int) -> None:
    clips = TrainingClips(videos, ClipShape(6, 64, stride), seed=3)
    starts: dict[int, set[int]] = {place: set() for place in range(12)}
    for epoch in range(12):
        batch, broken = clips[request(*range(12), epoch=epoch)]
        assert batch.pixels.shape == (12, 3, 6, 64, 64)
        assert batch.pixels.dtype == torch.uint8
        assert not broken
        assert batch.indices.tolist() == list(range(12))
        for place, clip in enumerate(batch.pixels):
            numbers = numbers_of(clip)
            assert numbers == list(range(numbers[0], numbers[0] + 6 * stride, stride))
            assert video_of(clip) == number_of(videos[place])
            assert batch.labels[place] == videos[place].label
            starts[place].add(numbers[0])
    assert min(len(found) for found in starts.values()) > 2
    for place, found in starts.items():
        assert max(found) <= LENGTHS[number_of(videos[place])] - (5 * stride + 1)


def test_all_moments_of_a_video_come_about_equally_often(videos: list[Video], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipShape, "read", lambda shape, path, start: torch.tensor(start))
    monkeypatch.setattr(ClipShape, "num_starts", lambda shape, path: 9)
    clips = TrainingClips(videos, SHAPE)
    starts = torch.cat([clips[request(*range(12), epoch=epoch)].batch.pixels for epoch in range(150)])
    counts = starts.bincount(minlength=9)
    assert len(counts) == 9
    assert (counts - 200).abs().max() < 5 * 200**0.5


def test_a_clip_depends_on_seed_epoch_and_place_alone(videos: list[Video]) -> None:
    clips = TrainingClips(videos, SHAPE, mirrored=True, seed=1)
    whole = clips[request(*range(12), epoch=5)].batch
    parts = [clips[request(place, epoch=5)].batch for place in reversed(range(12))]
    for name in ("pixels", "labels", "indices"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in reversed(parts)]))
    for seed, epoch in ((2, 5), (1, 6)):
        other = TrainingClips(videos, SHAPE, mirrored=True, seed=seed)[request(*range(12), epoch=epoch)].batch
        assert not torch.equal(whole.pixels, other.pixels)


def test_about_half_of_the_clips_are_mirrored_where_asked_for(videos: list[Video]) -> None:
    plain, mirrored = (TrainingClips(videos, SHAPE, mirrored) for mirrored in (False, True))
    count = 0
    for epoch in range(5):
        both = [clips[request(*range(12), epoch=epoch)].batch.pixels for clips in (plain, mirrored)]
        for one, other in zip(*both, strict=True):
            assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
            count += not torch.equal(one, other)
    assert 15 < count < 45


@pytest.mark.parametrize(("stride", "clips_per_video"), [(1, 1), (2, 1), (1, 3), (3, 4)])
def test_fixed_clips_are_evenly_spaced_about_the_middle(videos: list[Video], stride: int, clips_per_video: int) -> None:
    shape = ClipShape(6, 64, stride)
    clips = FixedClips(videos, shape, clips_per_video)
    assert len(clips) == 12 * clips_per_video
    batch, _ = clips[request(*range(len(clips)))]
    assert torch.equal(batch.pixels, clips[request(*range(len(clips)), epoch=1)].batch.pixels)
    for place, video in enumerate(videos):
        mine = range(place * clips_per_video, (place + 1) * clips_per_video)
        assert {video_of(batch.pixels[i]) for i in mine} == {number_of(video)}
        last = LENGTHS[number_of(video)] - shape.span
        starts = [numbers_of(batch.pixels[i])[0] for i in mine]
        expected = [(k + 0.5) / clips_per_video * last for k in range(clips_per_video)]
        assert np.abs(np.array(starts) - expected).max() < 1
        assert numbers_of(batch.pixels[mine[0]]) == list(range(starts[0], starts[0] + shape.span, stride))


def test_clips_of_the_shortest_video_are_the_whole() -> None:
    assert [fixed_start(1, number, 3) for number in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(("height", "width", "size"), [(240, 320, 128), (320, 240, 64), (64, 64, 64), (30, 50, 48)])
def test_frames_are_resized_like_pillow_does_and_cropped_in_the_middle(height: int, width: int, size: int) -> None:
    random = np.random.default_rng(height)
    coarse = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    frame = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    scale = size / min(height, width)
    large = Image.fromarray(frame).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (large.width - size) // 2, (large.height - size) // 2
    expected = np.asarray(large.crop((left, top, left + size, top + size))).astype(int)
    found = resize_and_crop(torch.from_numpy(np.stack([frame, frame[::-1]])), size)
    assert found.shape == (3, 2, size, size)
    assert found.is_contiguous()
    assert np.abs(found[:, 0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_senseless_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ClipShape(0)


# ---- broken videos ----


@pytest.fixture
def broken_layout(own_layout: tuple[Path, Path]) -> tuple[list[Video], set[str]]:
    """Twelve videos of which three are damaged, each in its way."""
    names = {video_name(number) for number in (1, 5, 9)}
    for name, how in zip(sorted(names), ("cut", "garbled", "empty"), strict=True):
        break_video(own_layout[0] / name, how)
    return list_videos(*own_layout, "all", val=False), names


def test_in_training_another_video_takes_the_place_of_a_broken_one(
    broken_layout: tuple[list[Video], set[str]],
) -> None:
    videos, names = broken_layout
    clips = TrainingClips(videos, SHAPE)
    batch, broken = clips[request(*range(12))]
    assert {name for name, _ in broken} == names
    assert len(batch.labels) == 12
    for clip, label, place in zip(batch.pixels, batch.labels, batch.indices.tolist(), strict=True):
        assert videos[place].name not in names
        assert (number_of(videos[place]), videos[place].label) == (video_of(clip), label)
    again = clips[request(*range(12))].batch
    assert torch.equal(batch.pixels, again.pixels)
    replaced = [place for place, index in enumerate(batch.indices.tolist()) if place != index]
    assert {videos[place].name for place in replaced} == names
    later = [clips[request(*replaced, epoch=epoch)].batch.indices.tolist() for epoch in range(1, 9)]
    assert len({tuple(places) for places in later}) > 3


def test_in_measuring_a_broken_video_is_left_out(broken_layout: tuple[list[Video], set[str]]) -> None:
    videos, names = broken_layout
    batch, broken = FixedClips(videos, SHAPE, 2)[request(*range(24))]
    assert {name for name, _ in broken} == names
    assert len(batch.labels) == 18
    assert not {videos[place // 2].name for place in batch.indices.tolist()} & names
    nothing, _ = FixedClips(videos, SHAPE)[request(*(p for p, video in enumerate(videos) if video.name in names))]
    assert nothing.pixels.shape == (0, 3, 6, 64, 64)


def test_what_is_no_file_is_a_broken_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "waits.avi")
    (tmp_path / "endless.avi").symlink_to("/dev/zero")
    for name in ("waits.avi", "endless.avi"):
        with pytest.raises(BrokenClipError, match="FIFO, a socket or a device"):
            num_frames(tmp_path / name)
        with pytest.raises(BrokenClipError, match="FIFO, a socket or a device"):
            SHAPE.read(tmp_path / name, 0)


def test_too_short_videos_are_broken_ones(videos: list[Video]) -> None:
    (shortest,) = (video for video in videos if number_of(video) == 0)
    assert num_frames(shortest.path) == 20
    assert ClipShape(4, 64, stride=6).num_starts(shortest.path) == 2
    with pytest.raises(BrokenClipError, match="too short: 20 frames, where a clip needs 21"):
        ClipShape(6, 64, stride=4).num_starts(shortest.path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_videos_are_named_once_and_counted(
    broken_layout: tuple[list[Video], set[str]], num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    videos, names = broken_layout
    loader = ClipLoader(FixedClips(videos, SHAPE), HeldOutOrder(12, 1, 0, 1), num_workers, max_broken=0.25)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == 9  # batches of nothing do not come
            assert sum(len(batch.labels) for batch in batches) == 9
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("clip_batches")]
    assert [sum(name in message for message in messages) for name in sorted(names)] == [1, 1, 1]
    assert messages[-1].endswith("broken videos so far: 3")
    assert set(loader.broken) == names


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_videos_stop_the_loader(broken_layout: tuple[list[Video], set[str]], num_workers: int) -> None:
    loader = ClipLoader(FixedClips(broken_layout[0], SHAPE), HeldOutOrder(12, 4, 0, 1), num_workers, max_broken=0.2)
    telling = r"3 of 12 videos are broken or too short, more than max_broken 0\.2.*_c0"
    with pytest.raises(UserError, match=telling) as stop:
        list(loader)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_that_is_all_broken_stops_the_loader(own_layout: tuple[Path, Path], num_workers: int) -> None:
    for path in own_layout[0].rglob("*.avi"):
        break_video(path, "cut")
    clips = TrainingClips(list_videos(*own_layout, "all", val=False), SHAPE)
    loader = ClipLoader(clips, HeldOutOrder(12, 4, 0, 1), num_workers, max_broken=1)
    with pytest.raises(UserError, match=r"^8 videos that were tried .*cut short") as stop:
        list(loader)
    assert "\n" not in str(stop.value)


# ---- the data module ----


class Recorder(LightningModule):
    """Learns nothing, and notes which clips it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown: list[tuple[list[int], list[int]]] = []
        self.val: list[int] = []

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        self.check(batch)
        self.shown.append((batch.indices.tolist(), [self.first_number(clip) for clip in batch.pixels]))
        return self.weight * 0

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        self.check(batch)
        self.val += batch.indices.tolist()

    @staticmethod
    def check(batch: ClipBatch) -> None:
        assert batch.pixels.dtype == torch.float32
        assert 0 <= batch.pixels.min() < 0.2 < 0.8 < batch.pixels.max() <= 1

    @staticmethod
    def first_number(clip: Tensor) -> int:
        return numbers_of((clip * 255).byte())[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_module(layout: tuple[Path, Path], **settings: Any) -> UCF101DataModule:
    root, lists = layout
    small: dict[str, Any] = {"num_frames": 6, "size": 64, "batch_size": 4, "num_workers": 0, "seed": 7}
    return UCF101DataModule(str(root), str(lists), **small | settings)


def trainer(folder: Path, **settings: Any) -> Trainer:
    plain: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0}
    return Trainer(default_root_dir=folder, **plain | quiet | settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_shows_the_same_global_batches_however_they_are_split(
    layout: tuple[Path, Path], tmp_path: Path, num_workers: int
) -> None:
    shown = []
    for micro_batch_size in (None, 2, 1):
        model = Recorder()
        data = data_module(layout, micro_batch_size=micro_batch_size, num_workers=num_workers)
        trainer(tmp_path, max_steps=6, accumulate_grad_batches=4 // (micro_batch_size or 4)).fit(model, data)
        pairs = [pair for batch in model.shown for pair in zip(*batch, strict=True)]
        shown.append([sorted(pairs[4 * step : 4 * step + 4]) for step in range(6)])
    assert shown[0] == shown[1] == shown[2]
    for epoch in range(3):
        assert sorted(i for step in shown[0][2 * epoch : 2 * epoch + 2] for i, _ in step) == list(range(8))
    assert shown[0][:2] != shown[0][2:4]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_with_the_batch_that_was_next(
    layout: tuple[Path, Path], tmp_path: Path, stop: int, num_workers: int
) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=6).fit(whole, data_module(layout, num_workers=num_workers))
    stopped = trainer(tmp_path, max_steps=stop)
    stopped.fit(first, data_module(layout, num_workers=num_workers))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = trainer(tmp_path, max_steps=6)
    resumed.fit(second, data_module(layout, num_workers=num_workers), ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert first.shown + second.shown == whole.shown


def test_validation_shows_every_val_video_once(layout: tuple[Path, Path], tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, limit_val_batches=1.0).validate(model, data_module(layout, batch_size=3), verbose=False)
    assert model.val == [0, 1, 2, 3]
    model = Recorder()
    trainer(tmp_path, limit_val_batches=1.0).validate(model, data_module(layout, split="all"), verbose=False)
    assert model.val == list(range(12))


def test_too_large_batches_and_senseless_settings_are_refused(layout: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 samples, fewer than batch_size 9"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), data_module(layout, batch_size=9))
    with pytest.raises(ValueError, match="max_broken"):
        data_module(layout, max_broken=2)
    with pytest.raises(UserError, match="classInd"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), data_module((tmp_path / "no", tmp_path / "where")))


def test_other_batches_are_left_alone(layout: tuple[Path, Path]) -> None:
    other = cast(Any, SimpleNamespace(pixels="something"))
    assert data_module(layout).on_after_batch_transfer(other, 0) is other

"""Moving digits: the files are laid out like UCF-101, and show what their names say."""

import json
import os
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from av.video.frame import PictureType
from lightning import LightningModule, Trainer
from torch import Tensor

from elt_lightning.data.clip_batches import ClipBatch
from elt_lightning.data.clips import ClipShape
from elt_lightning.data.decoding import num_frames, read_clip
from elt_lightning.data.toy import moving_digits
from elt_lightning.data.toy.moving_digit_tokens import MovingDigitsTokensDataModule
from elt_lightning.data.toy.moving_digits import FRAMES, MOTIONS, MovingDigits, MovingDigitsDataModule
from elt_lightning.data.ucf101 import list_videos, read_classes
from elt_lightning.errors import UserError
from elt_lightning.metrics.digits import load_digit_network
from elt_lightning.metrics.handwriting import load_handwriting
from elt_lightning.reproduce.clip_reading import writings

DIGITS = MovingDigits(training_videos=9, val_videos=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "moving_digits"
    DIGITS.write(root)
    return root


def stamps(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


# ---- the files ----


def test_the_layout_is_that_of_ucf101(root: Path) -> None:
    lists, videos = root / "ucfTrainTestlist", root / "UCF-101"
    assert sorted(os.listdir(root)) == ["UCF-101", "moving_digits.json", "ucfTrainTestlist"]
    assert sorted(os.listdir(videos)) == sorted(MOTIONS) == list(read_classes(lists))
    assert (lists / "classInd.txt").read_text().splitlines()[:2] == ["1 Bouncing", "2 Clockwise"]
    training, val = ((lists / f"{name}list01.txt").read_text().splitlines() for name in ("train", "test"))
    assert training[0] == "Bouncing/v_Bouncing_g02_c01.avi 1"
    assert training[-1] == "Zigzag/v_Zigzag_g04_c01.avi 10"
    assert val[:3] == [f"Bouncing/v_Bouncing_g01_c0{clip}.avi" for clip in (1, 2, 3)]
    both = [list_videos(videos, lists, 1, side) for side in (False, True)]
    assert [len(side) for side in both] == [90, 30]
    assert sorted(both[0] + both[1]) == list_videos(videos, lists, "all", val=False)


def test_files_are_what_xvid_writes_and_a_third_have_b_frames(root: Path) -> None:
    with_b_frames = []
    lengths = set()
    for path in sorted((root / "UCF-101").rglob("*.avi")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            assert (codec.name, codec.codec_tag, codec.width, codec.height) == ("mpeg4", "XVID", 64, 64)
            assert stream.average_rate == 20
            kinds = [frame.pict_type for frame in container.decode(stream)]
        with_b_frames.append(PictureType.B in kinds)
        assert len(kinds) == num_frames(path)
        lengths.add(len(kinds))
    assert sum(with_b_frames) == len(with_b_frames) // 3
    assert FRAMES[0] <= min(lengths) < max(lengths) < FRAMES[1]


def moments(clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure ink (F, H, W, 3) uint8: its middle in pixels, right and down, and its spread, (F,) each."""
    grey = clip.float().mean(3)
    ink = (grey - grey.flatten(1).median(1).values[:, None, None] - 20).clamp(min=0)
    ink = ink / ink.sum((1, 2), keepdim=True)
    places = torch.arange(64.0)
    x, y = (ink.sum(1) * places).sum(1), (ink.sum(2) * places).sum(1)
    spread = (ink.sum(1) * (places - x[:, None]) ** 2).sum(1) + (ink.sum(2) * (places - y[:, None]) ** 2).sum(1)
    return x, y, spread.sqrt()


def recognise(clip: Tensor) -> str:
    """Tell the motion from some frames, by what a person would look at."""
    x, y, spread = moments(clip)
    if not 0.8 < spread[-1] / spread[0] < 1.25 and (x[-1] - x[0]).abs() + (y[-1] - y[0]).abs() < 4:
        return "Growing" if spread[-1] > spread[0] else "Shrinking"
    dx, dy = x.diff(), y.diff()
    turning = (dx[:-1] * dy[1:] - dy[:-1] * dx[1:]).sign().mean()
    ranges = (x.max() - x.min(), y.max() - y.min())
    if turning.abs() > 0.6 and min(ranges) > 6:
        return "Clockwise" if turning > 0 else "Counterclockwise"  # down is positive, so turning right is too
    if min(ranges) > 5:
        return "Zigzag"
    if ranges[0] > ranges[1]:
        return "Right" if dx.mean() > 0 else "Left"
    if dy.min() < -0.5 and dy.max() > 0.5:
        return "Bouncing"
    return "Down" if dy.mean() > 0 else "Up"


def test_motions_are_what_they_are_called_in_any_16_frames(root: Path) -> None:
    for motion in MOTIONS:
        for path in sorted((root / "UCF-101" / motion).iterdir()):
            for first in (0, 4, num_frames(path) - 16):
                assert recognise(read_clip(path, first, 16)) == motion, (path.name, first)


def test_val_videos_show_other_writings() -> None:
    shown: dict[bool, set[bytes]] = {True: set(), False: set()}
    for video in DIGITS.videos():
        shown[video.val].add(video.writing.numpy().tobytes())
    for val, drawn in shown.items():
        there = {image.numpy().tobytes() for image in load_handwriting(val).images[:, 0]}
        other = {image.numpy().tobytes() for image in load_handwriting(not val).images[:, 0]}
        assert drawn <= there - other


def test_a_group_shows_one_writing_in_several_ways(root: Path) -> None:
    names = ["g02_c01", "g02_c02", "g02_c03", "g03_c01"]
    clips = [read_clip(root / f"UCF-101/Up/v_Up_{name}.avi", 0, 32) for name in names]
    assert len({clip.numpy().tobytes() for clip in clips}) == 4
    groups = [(video.group, video.writing) for video in DIGITS.videos() if video.motion == "Up"]
    for group, writing in groups:
        for other_group, other in groups:
            assert torch.equal(writing, other) == (group == other_group)


def test_sharp_digits_are_read_where_they_are_and_the_ground_is_black(root: Path, tmp_path: Path) -> None:
    """Growing and shrinking ones are too small to be read at one end."""
    sharp, network = MovingDigits(training_videos=1, val_videos=4, style="sharp"), load_digit_network(tmp_path)
    assert "style" not in json.loads((root / "moving_digits.json").read_text())  # as older folders of soft ones
    assert sharp._settings()["style"] == "sharp"
    right = []
    for video in sharp.videos():
        assert video.digit == list(MOTIONS).index(video.motion)
        if video.motion in ("Growing", "Shrinking"):
            continue
        frames = sharp.draw(video.motion, video.writing, video.number)
        assert (frames.flatten(1).median(1).values == 0).all()
        assert (frames.flatten(1).max(1).values > 220).all()
        places = sharp.place(video.motion, video.number)[0]
        read = network(writings(frames[::8, ..., 0] / 255, places[::8]))
        right.append((read.argmax(1) == video.digit).float().mean())
        if video.motion not in ("Bouncing", "Zigzag"):  # which turn back
            middles = -places[::4, :, 2] / places[::4, :1, 0] * 4  # in tokens, at the first frame of each
            assert torch.allclose(middles.diff(dim=0), middles.diff(dim=0).round(), atol=1e-5)
    assert sum(right) / len(right) > 0.9


def test_a_video_that_cannot_be_read_is_named_where_networks_read_all(tmp_path: Path) -> None:
    MovingDigits(training_videos=1, val_videos=1).write(tmp_path / "digits")
    data = object.__new__(MovingDigitsTokensDataModule)  # without the shards, which it does not read here
    data.root, data.shape = str(tmp_path / "digits"), ClipShape(8, 16, 2)
    assert len(data._read(val=True, most=4).pixels) == 40
    first = tmp_path / "digits" / "UCF-101" / "Bouncing" / "v_Bouncing_g01_c01.avi"
    first.write_bytes(b"no video")
    with pytest.raises(UserError, match=rf"{first.name} cannot be read"):
        data._read(val=True, most=4)


# ---- written once ----


def test_files_are_written_once_and_the_same_each_time(root: Path, tmp_path: Path) -> None:
    before = stamps(root)
    DIGITS.write(root)
    assert stamps(root) == before
    DIGITS.write(tmp_path / "again")
    for path in root.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_what_was_interrupted_leaves_nothing_and_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = moving_digits.write_clip

    def stop_at_the_fourth(*arguments: Any, **options: Any) -> None:
        written.append(arguments[0])
        if len(written) == 4:
            raise KeyboardInterrupt
        original(*arguments, **options)

    monkeypatch.setattr(moving_digits, "write_clip", stop_at_the_fourth)
    small = MovingDigits(training_videos=1, val_videos=1)
    with pytest.raises(KeyboardInterrupt):
        small.write(tmp_path / "digits")
    assert os.listdir(tmp_path) == []
    small.write(tmp_path / "digits")
    assert len(list((tmp_path / "digits").rglob("*.avi"))) == 20


def test_another_process_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = MovingDigits(training_videos=1, val_videos=1)
    original = MovingDigits._write_videos

    def be_overtaken(digits: MovingDigits, folder: Path) -> None:
        original(digits, folder)
        monkeypatch.setattr(MovingDigits, "_write_videos", original)
        small.write(tmp_path / "digits")

    monkeypatch.setattr(MovingDigits, "_write_videos", be_overtaken)
    small.write(tmp_path / "digits")
    assert os.listdir(tmp_path) == ["digits"]


def test_a_folder_of_something_else_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="something else"):
        DIGITS.write(tmp_path)
    with pytest.raises(UserError, match="something else"):
        DIGITS.write(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="other settings"):
        MovingDigits(training_videos=10, val_videos=3).write(root)
    assert json.loads((root / "moving_digits.json").read_text())["training_videos"] == 9
    assert os.listdir(tmp_path) == ["thesis.tex"]


# ---- the data module ----


class Watcher(LightningModule):
    """Notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shapes: set[tuple[int, ...]] = set()
        self.labels: set[int] = set()
        self.val = 0

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        self.shapes.add(tuple(batch.pixels.shape))
        self.labels |= set(batch.labels.tolist())
        assert batch.pixels.dtype == torch.float32
        assert 0 <= batch.pixels.min() < batch.pixels.max() <= 1
        return self.weight * 0

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        self.val += len(batch.labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_data_module_writes_the_files_and_gives_clips_of_them(tmp_path: Path) -> None:
    data = MovingDigitsDataModule(str(tmp_path / "digits"), 4, 1, num_frames=8, size=32, stride=2, batch_size=10)
    model = Watcher()
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, enable_checkpointing=False,
        num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    trainer.fit(model, data)
    assert model.shapes == {(10, 3, 8, 32, 32)}
    assert model.labels == set(range(10))
    assert model.val == 10
    assert data.classes == tuple(MOTIONS)

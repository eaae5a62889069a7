"""`elt encode ucf101` end to end, on small real videos."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from torch import Tensor
from video_files import CLASSES, break_video, video_name, write_ucf101

from elt_lightning.commands.encode import run
from elt_lightning.data import encode
from elt_lightning.data.clips import fixed_start, resize_and_crop
from elt_lightning.data.decoding import read_clip
from elt_lightning.data.encoded import check_same_codes
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.toy.moving_digits import MovingDigits
from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers.base import Tokenizer

LENGTHS = [20 + 3 * number for number in range(12)]


class Brightness(Tokenizer):
    """The mean of each 2 frames of 8×8 pixels, as one of as many levels as a file says."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.codebook_size = path, int(Path(path).read_text())

    def encode(self, pixels: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool3d(pixels.mean(1, keepdim=True), (2, 8, 8))
        return (means * (self.codebook_size - 0.001)).long().flatten(1)

    def store(self, pixels: Tensor) -> Tensor:
        return self.encode(pixels).to(torch.int16)

    def code_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        if frames % 2 or height % 8 or width % 8:
            raise ValueError(f"{frames}×{height}×{width} does not divide into 2×8×8")
        return (frames // 2, height // 8, width // 8)

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        return {
            "class_path": "test_encode_ucf101.Brightness",
            "init_args": {"path": self.path},
            "sha256": sha256(self.path),
        }


class Misshapen(Brightness):
    def store(self, pixels: Tensor) -> Tensor:
        return super().store(pixels)[:, 1:]


class NotOfClips(Tokenizer):
    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...

    def description(self) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_ucf101(tmp_path_factory.mktemp("ucf101"), LENGTHS)


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    path = tmp_path / "levels.txt"
    path.write_text("300")
    return path


def elt_encode(
    layout: tuple[Path, Path], levels: Path, output: Path, *flags: str, tokenizer: str = "Brightness"
) -> None:
    where = ["--root", str(layout[0]), "--annotations", str(layout[1]), "--output", str(output)]
    small = ["--size=32", "--num_frames=4", "--samples_per_shard=3", "--batch_size=2", "--num_workers=0"]
    what = ["--tokenizer", f"test_encode_ucf101.{tokenizer}", "--tokenizer_path", str(levels)]
    run("encode", ["ucf101", *where, *small, *what, *flags])


def read(folder: Path) -> dict[int, tuple[np.ndarray, dict[str, Any]]]:
    """Read all samples of the shards that the index lists, by number."""
    samples = {}
    for shard in ShardIndex.read(str(folder)).shards:
        found = list(webdataset.tarfile_to_samples()([{"url": str(folder / shard.name)}]))
        assert len(found) == shard.num_samples
        for members in found:
            codes = np.load(io.BytesIO(members["codes.npy"]), allow_pickle=False)
            samples[int(members["__key__"])] = (codes, json.loads(members["json"]))
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(root: Path, name: str, start: int, stride: int = 1) -> np.ndarray:
    """What the tokenizer makes of a clip, counted out by NumPy."""
    pixels = resize_and_crop(read_clip(root / name, start, 4, stride), 32).double().numpy() / 255
    means = pixels.mean(0).reshape(2, 2, 4, 8, 4, 8).mean((1, 3, 5))
    return np.floor(means * 299.999).reshape(-1)


# ---- what is written ----


@pytest.mark.parametrize(("clips_per_video", "stride"), [(1, 1), (3, 2)])
def test_tokens_are_those_of_evenly_spaced_clips(
    layout: tuple[Path, Path], levels: Path, tmp_path: Path, clips_per_video: int, stride: int
) -> None:
    flags = (f"--clips_per_video={clips_per_video}", f"--stride={stride}")
    elt_encode(layout, levels, tmp_path / "out", *flags)
    index = ShardIndex.read(str(tmp_path / "out"))
    assert (index.classes, index.image_size, index.frames, index.copies) == (CLASSES, 32, 4, 1)
    assert (index.input_shape, index.stored_shape, index.codebook_size) == ((2, 4, 4), (32,), 300)
    assert (index.latent_scale, index.crop, index.unreadable) == (None, "short-side-bilinear-centre", ())
    assert index.tokenizer["sha256"] == sha256(levels)
    samples = read(tmp_path / "out")
    assert sorted(samples) == list(range(8 * clips_per_video))
    sources = set()
    for codes, about in samples.values():
        name, _, start = about["source"].rpartition(":")
        sources.add((name, int(start)))
        assert CLASSES[about["label"]] == name.partition("/")[0]
        assert codes.shape == (1, 32)
        assert codes.dtype == np.int16
        assert np.abs(codes[0] - tokens_of(layout[0], name, int(start), stride)).max() <= 1
    training = [number for number in range(12) if number % 3 != 2]
    assert sources == {
        (video_name(number), fixed_start(LENGTHS[number] - 3 * stride, clip, clips_per_video))
        for number in training
        for clip in range(clips_per_video)
    }


def test_mirror_images_val_videos_and_all(layout: tuple[Path, Path], levels: Path, tmp_path: Path) -> None:
    elt_encode(layout, levels, tmp_path / "train", "--mirrored")
    elt_encode(layout, levels, tmp_path / "test", "--mirrored", "--val")
    elt_encode(layout, levels, tmp_path / "all", "--mirrored", "--split=all")
    train, test, both = (read(tmp_path / name) for name in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (8, 4, 12)
    by_source = {about["source"]: codes for codes, about in both.values()}
    for codes, about in [*train.values(), *test.values()]:
        assert np.array_equal(by_source[about["source"]], codes)
        assert codes.shape == (2, 32)
        assert np.abs(codes[1].reshape(2, 4, 4) - codes[0].reshape(2, 4, 4)[..., ::-1]).max() <= 1
    indices = [ShardIndex.read(str(tmp_path / name)) for name in ("train", "test")]
    check_same_codes("train", indices[0], "test", indices[1])


def test_the_result_depends_neither_on_batches_nor_on_processes(
    layout: tuple[Path, Path], levels: Path, tmp_path: Path
) -> None:
    elt_encode(layout, levels, tmp_path / "a", "--clips_per_video=2")
    elt_encode(layout, levels, tmp_path / "b", "--clips_per_video=2", "--batch_size=1", "--num_workers=2")
    for number in (2, 0, 1):
        assert not (tmp_path / "c" / "index.json").exists()
        elt_encode(layout, levels, tmp_path / "c", "--clips_per_video=2", "--batch_size=64", f"--shard={number}/3")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_run_that_was_stopped_goes_on_where_it_was(
    layout: tuple[Path, Path], levels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elt_encode(layout, levels, tmp_path / "whole")
    encoded: list[int] = []
    original = encode.encode_pixels

    def fail_in_the_second_shard(*arguments: Any) -> np.ndarray:
        encoded.append(len(arguments[0]))
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(encode, "encode_pixels", fail_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        elt_encode(layout, levels, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["00000.json", "00000.tar", "encode.json"]
    elt_encode(layout, levels, tmp_path / "out")
    assert encoded == [2, 1, 2, 1, 2, 1, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_moving_digits_are_encoded_by_the_same_command(tmp_path: Path, levels: Path) -> None:
    MovingDigits(training_videos=1, val_videos=1).write(tmp_path / "digits")
    layout = (tmp_path / "digits/UCF-101", tmp_path / "digits/ucfTrainTestlist")
    elt_encode(layout, levels, tmp_path / "out", "--size=64", "--num_frames=16")
    index = ShardIndex.read(str(tmp_path / "out"))
    assert (index.num_samples, index.input_shape, index.frames) == (10, (8, 8, 8), 16)


# ---- broken videos and wrong settings ----


def test_broken_and_short_videos_are_named_counted_and_skipped(
    tmp_path: Path, levels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = write_ucf101(tmp_path, [20] * 10 + [7] * 2)
    break_video(layout[0] / video_name(4), "cut")
    flags = ("--clips_per_video=2", "--stride=3", "--split=all", "--num_workers=1")
    elt_encode(layout, levels, tmp_path / "out", *flags, "--max_unreadable=0.5")
    captured = capsys.readouterr()
    skipped = [f"{video_name(number)}, clip {clip} of 2" for number in (4, 10, 11) for clip in (1, 2)]
    assert all(captured.err.count(f"unreadable, skipped: {name} (") == 1 for name in skipped)
    assert "(cut short: " in captured.err
    assert "(too short: 7 frames, where a clip needs 10)" in captured.err
    assert "18 clips encoded now, 6 unreadable" in captured.out
    assert "clips/s; " in captured.out
    assert "lists 18 clips, without 6 unreadable ones, 3 classes" in captured.out
    index = ShardIndex.read(str(tmp_path / "out"))
    assert sorted(index.unreadable) == sorted(skipped)
    assert index.num_samples == len(read(tmp_path / "out")) == 18
    with pytest.raises(UserError, match=r"6 clips cannot be read, more than --max_unreadable 0\.01"):
        elt_encode(layout, levels, tmp_path / "few", *flags)


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (["--stride=2"], "other stride"),
        (["--num_frames=6"], "other frames"),
        (["--clips_per_video=2"], "other clips_per_video"),
        (["--val"], "other videos"),
        (["--seed=1"], "other seed"),
    ],
)
def test_a_folder_of_other_settings_is_left_alone(
    layout: tuple[Path, Path], levels: Path, tmp_path: Path, flags: list[str], telling: str
) -> None:
    elt_encode(layout, levels, tmp_path / "out", "--shard=0/2")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=telling):
        elt_encode(layout, levels, tmp_path / "out", *flags)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (["--tokenizer=sd-vae"], "video-vq, tats"),
        (["--tokenizer=elt_lightning.tokenizers.continuous.PixelScaling"], "not a tokenizer of clips"),
        (["--tokenizer=test_encode_ucf101.NotOfClips"], "not a tokenizer of clips"),
        (["--tokenizer=video-vq", "--tokenizer_path=gone"], "gone"),
        (["--tokenizer=tats", "--tokenizer_path=gone"], "gone"),
        (["--size=36"], "--num_frames 4 and --size 36: .*does not divide"),
        (["--num_frames=5"], "--num_frames 5 and --size 32: .*does not divide"),
        (["--split=4"], "--split"),
        (["--split=2"], r"trainlist02\.txt cannot be read"),
        (["--clips_per_video=0"], "whole number from 1"),
        (["--annotations=gone"], "gone/classInd.txt cannot be read"),
        (["--root=gone"], "gone cannot be read"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    layout: tuple[Path, Path], levels: Path, tmp_path: Path, flags: list[str], telling: str
) -> None:
    with pytest.raises(UserError, match=telling) as refusal:
        elt_encode(layout, levels, tmp_path / "out", *flags)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_codes_that_cannot_be_right_and_the_videos_own_folder_are_refused(
    layout: tuple[Path, Path], levels: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"codes of shape \(31,\), not \(32,\)"):
        elt_encode(layout, levels, tmp_path / "out", tokenizer="Misshapen")
    with pytest.raises(UserError, match="lies in --root"):
        elt_encode(layout, levels, layout[0] / "out")
    levels.write_text("40000")
    with pytest.raises(UserError, match="16 bits"):
        elt_encode(layout, levels, tmp_path / "many")
    assert sorted(os.listdir(tmp_path)) == ["levels.txt", "out"]


def test_an_index_of_pictures_has_no_frames(tmp_path: Path) -> None:
    index = ShardIndex(("a",), 8, 1, (2, 2), (4,), 10, None, {}, "crop", ())
    index.write(tmp_path)
    assert ShardIndex.read(str(tmp_path)) == index
    written = json.loads((tmp_path / "index.json").read_text())
    del written["frames"]  # as it was written before there were clips
    (tmp_path / "index.json").write_text(json.dumps(written))
    assert ShardIndex.read(str(tmp_path)).frames is None

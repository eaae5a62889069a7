"""The frames that are given are the frames that were asked for, whatever the decoder and however they were coded."""

import builtins
import importlib.util
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import av
import pytest
import torch
from av.video.frame import PictureType
from torch import Tensor
from video_files import break_video, numbered_frames, read_number, write_packed_avi

from elt_lightning.data.avi import indexed_frames
from elt_lightning.data.decoding import (
    BrokenClipError,
    Decoder,
    default_decoder,
    num_frames,
    read_clip,
    write_clip,
)
from elt_lightning.errors import UserError

COUNT = 75

FILES: dict[str, Callable[[Path, Tensor], Any]] = {
    "mpeg4.avi": lambda path, frames: write_clip(path, frames),
    "mpeg4_b1.avi": lambda path, frames: write_clip(path, frames, b_frames=1),
    "mpeg4_b2.avi": lambda path, frames: write_clip(path, frames, b_frames=2),
    "packed_b1.avi": lambda path, frames: write_packed_avi(path, frames, 1),
    "packed_b2.avi": lambda path, frames: write_packed_avi(path, frames, 2),
    "h264.mp4": lambda path, frames: write_clip(path, frames, codec="h264"),
    "h264_b3.mp4": lambda path, frames: write_clip(path, frames, codec="h264", b_frames=3),
    "h264_b2.avi": lambda path, frames: write_clip(path, frames, codec="h264", b_frames=2),
}

DECODERS = [
    pytest.param("decord", marks=pytest.mark.skipif(not importlib.util.find_spec("decord"), reason="needs decord")),
    "av",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind, with the same frames."""
    folder = tmp_path_factory.mktemp("clips")
    for name, write in FILES.items():
        write(folder / name, numbered_frames(COUNT))
    return folder


def by_pyav(path: Path) -> Tensor:
    """Decode a whole file the shortest way that there is, without this package."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames)


# ---- the right frames ----


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_where_it_was_written(folder: Path, name: str) -> None:
    assert [read_number(frame) for frame in by_pyav(folder / name)] == list(range(COUNT))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("width", [8, 16, 18, 24, 32, 48])
def test_narrow_frames_have_three_colours(width: int, decoder: Decoder, tmp_path: Path) -> None:
    """decord pads the rows of some widths, and calls the padding channels."""
    frames = torch.randint(256, (3, 32, width, 3), dtype=torch.uint8)
    write_clip(tmp_path / "narrow.avi", frames)
    assert torch.equal(read_clip(tmp_path / "narrow.avi", 0, 3, decoder=decoder), by_pyav(tmp_path / "narrow.avi"))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_second_decoder(folder: Path, name: str, decoder: Decoder) -> None:
    expected = by_pyav(folder / name)
    assert num_frames(folder / name, decoder) == COUNT
    found = read_clip(folder / name, 0, COUNT, decoder=decoder)
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape
    assert (found.int() - expected.int()).abs().max() <= 2
    assert [read_number(frame) for frame in found] == list(range(COUNT))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FILES)
def test_clips_of_any_start_and_stride_hold_the_frames_asked_for(folder: Path, name: str, decoder: Decoder) -> None:
    draw = random.Random(name)
    for stride in (1, 2, 5):
        for start in [0, COUNT - 1 - 9 * stride, *(draw.randrange(COUNT - 9 * stride) for _ in range(4))]:
            clip = read_clip(folder / name, start, 10, stride, decoder)
            assert [read_number(frame) for frame in clip] == list(range(start, start + 10 * stride, stride))


@pytest.mark.parametrize("name", [name for name in FILES if "_b" in name and "h264" not in name])
def test_the_files_would_show_what_is_wrong_with_random_access(folder: Path, name: str) -> None:
    decord = pytest.importorskip("decord")
    frames = decord.VideoReader(str(folder / name)).get_batch(range(40, 50)).asnumpy()
    assert [read_number(torch.from_numpy(frame)) for frame in frames] != list(range(40, 50))


def test_packed_files_hold_two_frames_in_a_chunk(tmp_path: Path) -> None:
    frames = numbered_frames(COUNT)
    assert write_packed_avi(tmp_path / "b1.avi", frames, 1)[:5] == [1, 2, 1, 2, 1]
    assert write_packed_avi(tmp_path / "b2.avi", frames, 2)[:7] == [1, 2, 1, 1, 2, 1, 1]
    for name in ("b1.avi", "b2.avi"):
        with av.open(str(tmp_path / name)) as container:
            assert PictureType.B in {frame.pict_type for frame in container.decode(video=0)}


def has_libxvid() -> bool:
    if not shutil.which("ffmpeg"):
        return False
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True, check=False)
    return "libxvid" in listed.stdout


@pytest.mark.skipif(not has_libxvid(), reason="needs an ffmpeg with libxvid")
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_of_xvid_itself_are_right(tmp_path: Path, decoder: Decoder) -> None:
    path, frames = tmp_path / "xvid.avi", numbered_frames(COUNT)
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    arguments = f"-f rawvideo -pix_fmt rgb24 -s {size} -r 25 -i - -c:v libxvid -bf 2 -q:v 2 -pix_fmt yuv420p"
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", *arguments.split(), str(path)],
        input=frames.numpy().tobytes(),
        check=True,
    )
    assert b"DivX503b1393p" in path.read_bytes()  # packed
    expected = by_pyav(path)
    found = read_clip(path, 0, num_frames(path, decoder), decoder=decoder)
    assert torch.equal(found, expected)
    assert len(found) >= COUNT - 2  # that ffmpeg drops what the encoder still holds at the end
    assert [read_number(frame) for frame in found[:-1]] == list(range(len(found) - 1))
    clip = read_clip(path, 37, 10, 3, decoder)
    assert [read_number(frame) for frame in clip] == list(range(37, 67, 3))


# ---- what is missing or damaged ----


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("how", ["cut", "cut a little", "garbled", "empty", "text", "missing"])
@pytest.mark.parametrize("name", ["mpeg4.avi", "mpeg4_b2.avi", "packed_b1.avi", "h264_b2.avi"])
def test_damaged_files_are_noticed(folder: Path, tmp_path: Path, name: str, how: str, decoder: Decoder) -> None:
    path = tmp_path / name
    shutil.copy(folder / name, path)
    break_video(path, how)
    with pytest.raises(BrokenClipError) as caught:
        num_frames(path, decoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("how", ["cut", "empty", "text", "missing"])
def test_damaged_mp4_files_are_noticed(folder: Path, tmp_path: Path, how: str, decoder: Decoder) -> None:
    path = tmp_path / "h264.mp4"
    shutil.copy(folder / "h264.mp4", path)
    break_video(path, how)
    with pytest.raises(BrokenClipError):
        num_frames(path, decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_beyond_the_end_are_refused(folder: Path, decoder: Decoder) -> None:
    for start, count, stride in ((COUNT, 1, 1), (COUNT - 5, 6, 1), (0, 16, 5), (1000, 2, 1)):
        with pytest.raises(BrokenClipError, match="it ends before frame"):
            read_clip(folder / "mpeg4_b2.avi", start, count, stride, decoder)


@pytest.mark.parametrize(("first", "count", "stride"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_senseless_requests_are_refused(folder: Path, first: int, count: int, stride: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        read_clip(folder / "mpeg4.avi", first, count, stride)


def test_the_index_of_an_avi_counts_its_frames(folder: Path, tmp_path: Path) -> None:
    for name in FILES:
        assert indexed_frames(folder / name) == (COUNT if name.endswith(".avi") else None)
    content = (folder / "mpeg4.avi").read_bytes()
    place = content.rindex(b"idx1") + 8 + 16 * 10
    assert content[place : place + 4] == b"00dc"
    (tmp_path / "empty_chunk.avi").write_bytes(content[: place + 12] + bytes(4) + content[place + 16 :])
    assert indexed_frames(tmp_path / "empty_chunk.avi") == COUNT - 1


# ---- decoders ----


def test_pyav_stands_in_where_there_is_no_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_without(*missing: str) -> None:
        original = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else original(name))

    find_without("decord")
    assert default_decoder() == "av"
    find_without("decord", "av")
    with pytest.raises(UserError, match=r"pip install 'elt-lightning\[video\]'"):
        default_decoder()


def test_writing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_av(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError("no av")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match=r"pip install 'elt-lightning\[video\]'"):
        write_clip(tmp_path / "clip.avi", numbered_frames(3))


# ---- writing ----


@pytest.mark.parametrize("codec", ["mpeg4", "h264"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_what_is_written_is_what_was_asked_for(tmp_path: Path, codec: Literal["mpeg4", "h264"], b_frames: int) -> None:
    path, frames = tmp_path / "clip.avi", numbered_frames(30, height=48, width=96)
    write_clip(path, frames, fps=20, codec=codec, b_frames=b_frames)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (20, 96, 48)
        assert stream.codec_context.codec_tag == ("XVID" if codec == "mpeg4" else "H264")
        kinds = {frame.pict_type for frame in container.decode(stream)}
    assert (PictureType.B in kinds) == (b_frames > 0)
    assert (read_clip(path, 0, 30).float() - frames.float()).abs().mean() < 6  # colours are kept at half the size
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.avi"]


def test_only_colour_bytes_are_written(tmp_path: Path) -> None:
    for frames in (torch.zeros(3, 8, 8, 3), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            write_clip(tmp_path / "clip.avi", frames)

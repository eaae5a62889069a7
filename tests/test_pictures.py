"""Strips, GIFs and MP4 files of clips, read back."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.evaluation.pictures import GAP, clip_strip, nearest_figure, write_gif, write_mp4
from elt_lightning.metrics.nearest import nearest_items


def ramps(count: int, channels: int = 3, frames: int = 5, height: int = 40, width: int = 50) -> Tensor:
    """Clips of smooth ramps, each frame brighter than the one before it."""
    generator = torch.Generator().manual_seed(count)
    slope = torch.rand(count, channels, 1, 1, 1, generator=generator) * torch.linspace(0, 90, width)
    values = slope + torch.linspace(0, 60, height)[:, None] + 20 * torch.arange(frames)[:, None, None]
    return values.expand(count, channels, frames, height, width).to(torch.uint8)


def test_a_strip_shows_first_middle_and_last_frame() -> None:
    clips = ramps(2, frames=8, height=6, width=4)
    strip = clip_strip(clips)
    assert strip.shape == (2, 3, 6, 3 * 4 + 2 * GAP)
    for place, frame in enumerate((0, 4, 7)):
        left = place * (4 + GAP)
        assert torch.equal(strip[..., left : left + 4], clips[:, :, frame])
    assert (strip[..., 4 : 4 + GAP] == 255).all()
    assert torch.equal(clip_strip(clips, 1), clips[:, :, 0])
    assert clip_strip(clips, 99).shape[-1] == 8 * (4 + GAP) - GAP


def read_gif(path: Path) -> tuple[list[np.ndarray], list[int]]:
    with Image.open(path) as file:
        frames = [(np.array(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(file)]
    return [pixels for pixels, _ in frames], [duration for _, duration in frames]


@pytest.mark.parametrize(("channels", "tolerance"), [(1, 0), (3, 4)])
def test_a_gif_has_a_row_of_clips_for_each_loop_count(channels: int, tolerance: int, tmp_path: Path) -> None:
    rows = {"L = 1": ramps(3, channels), "L = 12": ramps(2, channels)}
    write_gif(tmp_path / "loops.gif", rows, fps=10)
    frames, durations = read_gif(tmp_path / "loops.gif")
    assert durations == [100] * 5
    height, width = 80, 100  # enlarged twice
    assert frames[0].shape[0] == 2 * (height + GAP)
    margin = frames[0].shape[1] - 3 * (width + GAP)
    assert margin > 20
    for number, frame in enumerate(frames):
        assert (frame[:, :margin].min(2) < 128).any()  # the labels
        for place, clips in enumerate(rows.values()):
            for column, clip in enumerate(clips):
                top, left = place * (height + GAP), margin + column * (width + GAP)
                shown = frame[top : top + height, left : left + width].astype(int)
                expected = clip[:, number].expand(3, -1, -1).permute(1, 2, 0).repeat_interleave(2, 0)
                expected = expected.repeat_interleave(2, 1).numpy().astype(int)
                assert abs(shown - expected).mean() <= tolerance
        assert (frame[height + GAP :, margin + 2 * (width + GAP) :] == 255).all()  # the row of two is shorter


def test_clips_of_one_gif_have_one_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clips of one GIF differ in shape"):
        write_gif(tmp_path / "loops.gif", {"a": ramps(1), "b": ramps(1, frames=6)})
    with pytest.raises(ValueError, match="clips of one GIF differ in shape"):
        write_gif(tmp_path / "loops.gif", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("channels", "size"), [(3, (40, 50)), (1, (33, 35))])
def test_an_mp4_holds_the_clip(channels: int, size: tuple[int, int], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clip = ramps(1, channels, 9, *size)[0]
    write_mp4(tmp_path / "new" / "clip.mp4", clip, fps=5)
    with av.open(str(tmp_path / "new" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 5)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    height, width = (side // 2 * 2 for side in size)
    expected = clip[..., :height, :width].expand(3, -1, -1, -1).permute(1, 2, 3, 0).numpy()
    assert frames.shape == expected.shape
    assert abs(frames.astype(int) - expected).mean() < 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_mp4_without_pyav_is_refused_in_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs PyAV: pip install 'elt-lightning\[video\]'"):
        write_mp4(tmp_path / "clip.mp4", ramps(1)[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 9, 12, 12), (1, 12, 12)], ids=["clips", "pictures"])
def test_samples_stand_above_their_nearest_items(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(256, (9, *shape), generator=generator, dtype=torch.uint8)
    figure = nearest_figure(items[[4, 7]], nearest_items(items[[4, 7]], [items]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["", "", "no. 4, MSE 0", "no. 7, MSE 0"]
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    assert np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[1], drawn[3])
    assert drawn[0].shape == ((12, 3 * 12 + 2 * GAP, 3) if len(shape) == 4 else (12, 12))
    figure.savefig(tmp_path / "nearest.png", bbox_inches="tight")
    assert (tmp_path / "nearest.png").stat().st_size > 1000

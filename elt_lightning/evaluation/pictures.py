"""Samples for people to look at: a row for each loop count; of clips strips of frames, animated GIFs, MP4 files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.files import written_aside
from elt_lightning.metrics.nearest import Nearest

GAP = 2
SMALLEST_SIDE = 64
"""Frames of a GIF are enlarged by a whole factor to at least as many pixels."""


def clip_strip(clips: Tensor, count: int = 3) -> Tensor:
    """Lay ``count`` frames of each clip side by side, white between them, evenly spaced from the first to the last.

    No more are taken than there are. (n, C, F, H, W) uint8 become pictures (n, C, H, count·(W + 2) − 2).
    """
    count = min(count, clips.shape[2])
    frames = clips[:, :, torch.linspace(0, clips.shape[2] - 1, count).round().long()]
    padded = torch.nn.functional.pad(frames, (0, GAP), value=255).permute(0, 1, 3, 2, 4)  # n C H count W
    return padded.flatten(3)[..., :-GAP]


def pictures_of(samples: Tensor) -> Tensor:
    """Return pictures (n, C, H, W) as they are, and of clips (n, C, F, H, W) first, middle and last frame as one."""
    return samples if samples.ndim == 4 else clip_strip(samples)


def loops_figure(rows: dict[str, Tensor], correct: Sequence[Tensor] = (), titles: Sequence[str] = ()) -> Figure:
    """Draw one labelled row of pictures after another; a column shares class and seed.

    Args:
        rows: {label: (n, C, H, W) uint8}, C 1 or 3; of clips (n, C, F, H, W) a few frames are drawn.
        correct: for each row (n,) bool, which pictures are right: they get a green frame, the others a red one; empty
            where none can be.
        titles: of the columns: the classes of the samples.
    """
    stills = {label: pictures_of(values) for label, values in rows.items()}
    columns = max(len(pictures) for pictures in stills.values())
    height, width = next(iter(stills.values())).shape[2:]
    figure = Figure(figsize=(1 + 1.4 * columns * width / height, 1.4 * len(rows)), dpi=100)
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, fontsize=10)
    for place, (label, pictures) in enumerate(stills.items()):
        for axes in grid[place]:
            axes.set_axis_off()
        grid[place, 0].text(-0.15, 0.5, label, transform=grid[place, 0].transAxes, ha="right", va="center", fontsize=14)
        for number, picture in enumerate(pictures):
            axes = grid[place, number]
            axes.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            if place < len(correct) and len(correct[place]):
                colour = "tab:green" if correct[place][number] else "tab:red"
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, color=colour, linewidth=4))
    return figure


def nearest_figure(samples: Tensor, nearest: Nearest) -> Figure:
    """Draw each sample above its nearest training item, with their distance between them.

    Args:
        samples: (n, C, H, W) pictures, or (n, C, F, H, W) clips, drawn by first, middle and last frame; uint8.
        nearest: of :func:`~elt_lightning.metrics.nearest.nearest_items`.
    """
    rows = [pictures_of(values) for values in (samples, nearest.items)]
    height, width = rows[0].shape[2:]
    size = (0.8 + 1.4 * len(samples) * min(width / height, 3), 3.4)
    figure = Figure(figsize=size, dpi=100)
    grid = figure.subplots(2, len(samples), squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.3})
    for name, pictures, row in zip(("sample", "nearest"), rows, grid, strict=True):
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
        for picture, axes in zip(pictures.cpu(), row, strict=True):
            axes.set_axis_off()
            axes.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for axes, index, distance in zip(grid[1], nearest.indices, nearest.distances, strict=True):
        axes.set_title(f"no. {int(index)}, MSE {float(distance):.2g}", fontsize=7)
    return figure


def write_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure without white borders, in the format of the path's ending; it appears whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, bbox_inches="tight")


def write_gif(path: str | Path, rows: dict[str, Tensor], fps: int = 8) -> None:
    """Write clips as one animated picture, a labelled row of clips for each entry, such as a loop count.

    Args:
        path: the file.
        rows: {label: (n, C, F, H, W) uint8}, C 1 or 3; frames, height and width are the same in all.
        fps: frames a second, which a GIF keeps to a hundredth of a second.

    Raises:
        ValueError: clips differ in frames, height or width.
    """
    if len({clips.shape[2:] for clips in rows.values()}) != 1:
        raise ValueError(f"clips of one GIF differ in shape: {[tuple(clips.shape) for clips in rows.values()]}")
    num_frames, height, width = next(iter(rows.values())).shape[2:]
    scale = -(-SMALLEST_SIDE // min(height, width))
    font = ImageFont.load_default()
    margin = 2 * GAP + max(int(font.getlength(label)) for label in rows)
    line, column = height * scale + GAP, width * scale + GAP
    across = margin + max(len(clips) for clips in rows.values()) * column
    # All frames stand one below another in one picture, so that they get one palette, and colours do not flicker.
    mode = "L" if all(clips.shape[1] == 1 for clips in rows.values()) else "RGB"
    sheet = Image.new(mode, (across, num_frames * len(rows) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for frame in range(num_frames):
        for place, (label, clips) in enumerate(rows.items()):
            top = (frame * len(rows) + place) * line
            draw.text((GAP, top + line // 2), label, fill="black", font=font, anchor="lm")
            for number, clip in enumerate(clips.cpu()):
                picture = Image.fromarray(clip[:, frame].expand(3, -1, -1).permute(1, 2, 0).numpy())
                picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
                sheet.paste(picture.convert(mode), (margin + number * column, top))
    indexed = sheet if mode == "L" else sheet.quantize(256, dither=Image.Dither.NONE)
    down = len(rows) * line
    frames = [indexed.crop((0, frame * down, across, (frame + 1) * down)) for frame in range(num_frames)]
    with written_aside(path) as aside:
        frames[0].save(aside, "GIF", save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)


def write_mp4(path: str | Path, clip: Tensor, fps: int = 8) -> None:
    """Write one clip (C, F, H, W) uint8, C 1 or 3, as H.264; odd heights and widths lose their last line.

    Raises:
        UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("writing MP4 files needs PyAV: pip install 'elt-lightning[video]'") from error
    even = clip[..., : clip.shape[-2] // 2 * 2, : clip.shape[-1] // 2 * 2]  # H.264 halves the resolution of colours
    pictures = even.expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    with written_aside(path) as aside, av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())

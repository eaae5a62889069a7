"""Real handwriting carried along ten motions: the smallest videos there are, as files laid out like UCF-101.

The class is the motion. Soft videos show it of any digit: no single frame tells it, and most have a twin that is the
same run backwards. Of sharp ones each class has its own digit. Training videos show the writings that training of
digits uses, held-out videos the others.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.data.decoding import write_clip
from elt_lightning.data.ucf101 import UCF101DataModule
from elt_lightning.errors import UserError
from elt_lightning.metrics.handwriting import load_handwriting

VIDEOS, LISTS, SETTINGS = "UCF-101", "ucfTrainTestlist", "moving_digits.json"


CLIPS_PER_GROUP = 4
"""A group is a few videos of one writing, as UCF-101's groups are of one scene."""

FRAMES = (32, 49)
"""A soft video has at least this many frames, and fewer than this many."""

Style = Literal["soft", "sharp"]
"""Light blurs on grey, of which only the motion can be told, or white strokes on black that a person reads."""

VERSIONS: dict[Style, int] = {"soft": 1, "sharp": 2}
"""Of what is drawn."""

SIZES: dict[Style, tuple[float, float]] = {"soft": (0.36, 0.12), "sharp": (0.58, 0.08)}
"""Of a digit, as a share of the frame: the smallest, and how much larger the largest is."""

CONTRAST, MARGIN = 4, 1
"""Of sharp strokes: how much steeper than in the enlarged writing, and pixels of it that are added on every side."""


class Path2D(NamedTuple):
    """Where a digit is in each frame, (F,) each: right and down from the middle, in [−1, 1], and its size in [0, 1]."""

    x: Tensor
    y: Tensor
    size: Tensor


def _line(x: float, y: float) -> Callable[[Tensor, float], Path2D]:
    """Go straight in a direction; the phase says how far to its side."""

    def move(time: Tensor, phase: float) -> Path2D:
        along, aside = 2 * time - 1, torch.full_like(time, phase - 0.5)
        return Path2D(x * along + abs(y) * aside, y * along + abs(x) * aside, torch.ones_like(time))

    return move


def _circle(turns: float) -> Callable[[Tensor, float], Path2D]:
    """Go round the middle a number of times, clockwise as seen."""

    def move(time: Tensor, phase: float) -> Path2D:
        angle = 2 * math.pi * (turns * time + phase)
        return Path2D(angle.cos(), angle.sin(), torch.ones_like(time))

    return move


def _zoom(first: float, last: float) -> Callable[[Tensor, float], Path2D]:
    """Change size on the spot."""

    def move(time: Tensor, phase: float) -> Path2D:
        place = torch.full_like(time, phase - 0.5)
        return Path2D(place, -place, first + (last - first) * time)

    return move


def _bounce(time: Tensor, phase: float) -> Path2D:
    """Fall to the ground and jump up again, on the spot."""
    height = (math.pi * (3 * time + phase)).sin().abs()
    return Path2D(torch.full_like(time, phase - 0.5), 1 - 2 * height, torch.ones_like(time))


def _zigzag(time: Tensor, phase: float) -> Path2D:
    """Go right, and up and down in straight lines meanwhile."""
    return Path2D(2 * time - 1, 4 * ((3 * time + phase) % 1 - 0.5).abs() - 1, torch.ones_like(time))


MOTIONS: dict[str, Callable[[Tensor, float], Path2D]] = {
    "Bouncing": _bounce,
    "Clockwise": _circle(1.5),
    "Counterclockwise": _circle(-1.5),
    "Down": _line(0, 1),
    "Growing": _zoom(0.3, 1.0),
    "Left": _line(-1, 0),
    "Right": _line(1, 0),
    "Shrinking": _zoom(1.0, 0.3),
    "Up": _line(0, -1),
    "Zigzag": _zigzag,
}
"""The classes: each turns times (F,) in [0, 1] and a phase in [0, 1) into a path."""


Moves = tuple[int, ...]

STILL: Moves = (0,) * 7
ON: Moves = (1,) * 7
BACK: Moves = (-1,) * 7
ON_AND_BACK: Moves = (1, 1, 1, 0, -1, -1, -1)
ROUND: tuple[Moves, Moves] = (2, 2, 0, 0, -2, -2, 0), (0, 0, 2, 2, 0, 0, -2)

MOVES: dict[str, tuple[Moves, Moves]] = {
    "Bouncing": (STILL, ON_AND_BACK),
    "Clockwise": ROUND,
    "Counterclockwise": ROUND[::-1],
    "Down": (STILL, ON),
    "Left": (BACK, STILL),
    "Right": (ON, STILL),
    "Up": (STILL, BACK),
    "Zigzag": (ON, ON_AND_BACK),
}
"""How sharp digits go right and down from every second frame to the next, in sixteenths of the frame.

So, but where it turns back, a digit moves by whole tokens from one frame of tokens (two frames of 32×32 pixels, 4×4
pixels each) to the next, and its codes move with it, if the tokenizer sees no zeros beyond the border.
"""


def _step_by_step(motion: str) -> Path2D:
    """Return a sharp digit's path; growing and shrinking ones stay in the middle."""
    if motion not in MOVES:
        return MOTIONS[motion](torch.linspace(0, 1, 2 * len(STILL) + 1), 0.5)
    x, y = (F.pad(torch.tensor(moves).repeat_interleave(2).cumsum(0), (1, 0)) / 16 for moves in MOVES[motion])
    return Path2D(x - (x.min() + x.max()) / 2, y - (y.min() + y.max()) / 2, torch.ones_like(x))


class DigitVideo(NamedTuple):
    """What a video shows."""

    name: str  # of its file, below the folder of videos
    motion: str  # a class
    number: int  # in its class
    val: bool  # it is held out
    group: int
    writing: Tensor  # (8, 8) float in [0, 1]
    digit: int


@dataclass(frozen=True)
class MovingDigits:
    """What the files hold."""

    training_videos: int = 40  # of each class
    val_videos: int = 10  # of each class
    side: int = 64  # height and width of a frame in pixels; even
    fps: int = 20  # frames per second
    seed: int = 0  # of the writings and how they move
    style: Style = "soft"  # of drawing

    def write(self, root: str | Path) -> None:
        """Write the files below a root, once: the folder appears whole or not at all.

        Below it lie ``UCF-101/<Motion>/v_<Motion>_gXX_cYY.avi`` (MPEG-4 as XviD writes it, every third with B-frames)
        and ``ucfTrainTestlist`` with the lists of split 1. The first groups are held out, as in UCF-101.

        Raises:
            UserError: the folder holds something else, or PyAV or scikit-learn is not installed.
        """
        root = Path(root)
        if self._is_written(root):
            return
        root.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
        try:
            self._write_videos(aside)
            (aside / SETTINGS).write_text(json.dumps(self._settings()) + "\n")
            aside.chmod(0o755)
            os.rename(aside, root)
            print(f"made {root}: the videos", flush=True)
        except OSError as error:
            if not self._is_written(root):  # or another process was faster
                raise UserError(f"{root} cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _settings(self) -> dict[str, int | str]:
        settings = asdict(self) | {"version": VERSIONS[self.style]}
        if self.style == "soft":  # folders that were made before there were styles are of this one
            del settings["style"]
        return settings

    def _is_written(self, root: Path) -> bool:
        try:
            found = json.loads((root / SETTINGS).read_text())
        except (OSError, ValueError) as error:
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                raise UserError(f"{root} holds something else than moving digits: choose another root") from error
            return False
        if found != self._settings():
            raise UserError(f"{root} holds moving digits of other settings, {found}: delete it, or choose another root")
        return True

    def _write_videos(self, root: Path) -> None:
        lists: dict[bool, list[str]] = {True: [], False: []}
        for video in self.videos():
            frames = self.draw(video.motion, video.writing, video.number)
            write_clip(root / VIDEOS / video.name, frames, self.fps, b_frames=2 if video.number % 3 == 2 else 0)
            label = "" if video.val else f" {list(MOTIONS).index(video.motion) + 1}"
            lists[video.val].append(video.name + label)
        (root / LISTS).mkdir()
        for name, lines in (
            ("classInd", [f"{label + 1} {motion}" for label, motion in enumerate(MOTIONS)]),
            ("testlist01", lists[True]),
            ("trainlist01", lists[False]),
        ):
            (root / LISTS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))

    def videos(self) -> Iterator[DigitVideo]:
        """List the videos, those of a motion one after another, and held-out ones before the others."""
        for label, motion in enumerate(MOTIONS):
            group = number = 0
            for val, videos in ((True, self.val_videos), (False, self.training_videos)):
                handwriting = load_handwriting(val)
                generator = torch.Generator().manual_seed(2 * (1000 * self.seed + label) + val)
                chosen = torch.randperm(len(handwriting.labels), generator=generator)
                if self.style == "sharp":
                    chosen = chosen[handwriting.labels[chosen] == label]
                for video in range(videos):
                    group += video % CLIPS_PER_GROUP == 0
                    name = f"{motion}/v_{motion}_g{group:02d}_c{video % CLIPS_PER_GROUP + 1:02d}.avi"
                    place = chosen[video // CLIPS_PER_GROUP % len(chosen)]
                    writing, digit = handwriting.images[place, 0], int(handwriting.labels[place])
                    yield DigitVideo(name, motion, number, val, group, writing, digit)
                    number += 1

    def draw(self, motion: str, writing: Tensor, number: int) -> Tensor:
        """Draw a video of a writing (8, 8) float in [0, 1] in a motion: (F, side, side, 3) uint8, light ink.

        The number of the video in its class decides, with the seed, the size, and of soft ones phase, pace and grey.
        """
        places, grey = self.place(motion, number)
        sharp = self.style == "sharp"
        ink = F.interpolate(F.pad(writing, (MARGIN * sharp,) * 4)[None, None], scale_factor=4, mode="bicubic")
        ink = (CONTRAST * (ink - 0.5) + 0.5 if sharp else ink).clamp(0, 1)
        ground, light = (0, 255) if sharp else (96 + 48 * grey, 235)
        grid = F.affine_grid(places, [len(places), 1, self.side, self.side], align_corners=False)
        cover = F.grid_sample(ink.expand(len(places), -1, -1, -1), grid, align_corners=False)
        return (ground + (light - ground) * cover).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)

    def place(self, motion: str, number: int) -> tuple[Tensor, float]:
        """Draw where a video's ink lies in each frame, and the grey of its ground in [0, 1].

        Places are what affine_grid asks for, (F, 2, 3): from a place in the frame to the place in the ink.
        """
        generator = torch.Generator().manual_seed(1000 * (1000 * self.seed + list(MOTIONS).index(motion)) + number)
        phase, scale, grey = torch.rand(3, generator=generator).tolist()
        count = int(torch.randint(*FRAMES, (), generator=generator))
        sharp = self.style == "sharp"
        path = _step_by_step(motion) if sharp else MOTIONS[motion](torch.linspace(0, 1, count), phase)
        smallest, spread = SIZES[self.style]
        size = (smallest + spread * scale) * path.size  # of the ink, as a share of the frame
        zoom, room = 1 / size, 1 if sharp else 1 - size.max()
        zeros = torch.zeros_like(zoom)
        rows = (zoom, zeros, -zoom * room * path.x, zeros, zoom, -zoom * room * path.y)
        return torch.stack(rows, 1).view(-1, 2, 3), grey


class MovingDigitsDataModule(UCF101DataModule):
    """Moving digits, written when they are first needed, then read as UCF-101 is; all else is the same.

    Args:
        root: folder of the files.
        training_videos: of each class.
        val_videos: of each class.
        num_frames: of a clip.
        size: of a clip's frames in pixels.
        stride: frames of the video from one frame of the clip to the next.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes on each device.
        seed: of the order of training samples, and the moments that are cut out; the files do not depend on it.
        style: light blurs on grey ("soft"), or white strokes on black that a person reads ("sharp").
    """

    def __init__(
        self,
        root: str = "data/moving_digits",
        training_videos: int = 40,
        val_videos: int = 10,
        num_frames: int = 16,
        size: int = 64,
        stride: int = 1,
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        style: Style = "soft",
    ) -> None:
        super().__init__(
            root=f"{root}/{VIDEOS}",
            annotations=f"{root}/{LISTS}",
            num_frames=num_frames,
            size=size,
            stride=stride,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.folder, self.files = root, MovingDigits(training_videos, val_videos, style=style)

    def prepare_data(self) -> None:
        """Write the files, once."""
        self.files.write(self.folder)

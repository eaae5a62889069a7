"""Batches of clips to train on or to judge by, read by several processes at once; broken videos are named and counted.

Letters: B batch, F frames of a clip, S its height and width in pixels.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from elt_lightning.data.base import HeldOutOrder, TrainingOrder
from elt_lightning.data.clips import ClipShape, Video, fixed_start
from elt_lightning.data.decoding import BrokenClipError
from elt_lightning.data.workers import Loader
from elt_lightning.errors import UserError
from elt_lightning.processes.noise import Stream, random_bits, sample_seeds

logger = logging.getLogger(__name__)

ATTEMPTS = 8
"""Videos that training tries before it gives a batch up: the one whose turn it is, and others in its place."""


class ClipBatch(NamedTuple):
    """One batch of clips."""

    pixels: Tensor  # (B, 3, F, S, S) uint8, as read; the model gets float in [0, 1]
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, each clip's place in its data set


class ClipRequest(NamedTuple):
    """Clips that are asked for."""

    places: list[int]  # of clips in their data set
    epoch: int = 0  # of training, which decides the moments that are cut out


class ClipOrder(Sampler[ClipRequest]):
    """Asks for clips in an order, and says which epoch it is where there are epochs."""

    def __init__(self, order: TrainingOrder | HeldOutOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[ClipRequest]:
        epoch, order = 0, self.order
        if isinstance(order, TrainingOrder):
            epoch = order.current_step() // (order.num_samples // order.batch_size)
        return (ClipRequest(places, epoch) for places in order)


class Clip(NamedTuple):
    """One clip."""

    pixels: Tensor  # (3, F, S, S) uint8
    label: int  # number of its class
    place: int  # in its data set
    start: int  # the video's frame that it begins with


class Reading(NamedTuple):
    """What became of a request: a batch, and the videos that could not be read, with the reasons."""

    batch: ClipBatch
    broken: list[tuple[str, str]]


class ClipDataset(Dataset[Reading], ABC):
    """Clips 0 … n − 1, of a shape, cut out of videos; indexed by a whole request at once."""

    def __init__(self, videos: Sequence[Video], shape: ClipShape) -> None:
        self.videos, self.shape = videos, shape

    @abstractmethod
    def __len__(self) -> int:
        """Count the clips."""

    def __getitem__(self, request: ClipRequest) -> Reading:
        broken: list[tuple[str, str]] = []
        read = (self.read(place, request.epoch, broken) for place in request.places)
        clips = [clip for clip in read if clip is not None]
        nothing = torch.empty(0, 3, self.shape.num_frames, self.shape.size, self.shape.size, dtype=torch.uint8)
        batch = ClipBatch(
            torch.stack([clip.pixels for clip in clips]) if clips else nothing,
            torch.tensor([clip.label for clip in clips], dtype=torch.int64),
            torch.tensor([clip.place for clip in clips], dtype=torch.int64),
        )
        return Reading(batch, broken)

    @abstractmethod
    def read(self, place: int, epoch: int, broken: list[tuple[str, str]]) -> Clip | None:
        """Read one clip; None where it cannot be read.

        Args:
            place: of the clip.
            epoch: of training.
            broken: gets the name of each video that cannot be read, and the reason.
        """


class TrainingClips(ClipDataset):
    """A clip of each video, of another moment in every epoch: a function of (seed, epoch, place).

    A video that cannot be read, or is too short, is replaced by another, drawn in the same way; label and index are
    then that other video's. ``mirrored`` mirrors every second clip, on average.
    """

    def __init__(self, videos: Sequence[Video], shape: ClipShape, mirrored: bool = False, seed: int = 0) -> None:
        super().__init__(videos, shape)
        self.mirrored, self.seed = mirrored, seed

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, place: int, epoch: int, broken: list[tuple[str, str]]) -> Clip | None:  # noqa: D102
        seeds = sample_seeds(self.seed, torch.tensor([place]))
        words = random_bits(seeds, epoch, Stream.CLIP_START, 2 * ATTEMPTS)[0].tolist()
        mirrored = self.mirrored and bool(random_bits(seeds, epoch, Stream.MIRRORED, 1) % 2)
        for attempt in range(ATTEMPTS):
            moment, other = words[2 * attempt : 2 * attempt + 2]
            video = self.videos[place]
            try:
                start = moment * self.shape.num_starts(video.path) >> 32
                pixels = self.shape.read(video.path, start)
                return Clip(pixels.flip(-1) if mirrored else pixels, video.label, place, start)
            except BrokenClipError as error:
                broken.append((video.name, str(error)))
                place = other * len(self.videos) >> 32
        names = ", ".join(f"{name} ({reason})" for name, reason in broken[-3:])
        raise UserError(f"{ATTEMPTS} videos that were tried in one another's place cannot be read: {names}, …")


class FixedClips(ClipDataset):
    """The same clips of each video in every run, see :func:`fixed_start`; what cannot be read is left out.

    Clip i is of video i // ``clips_per_video``.
    """

    def __init__(self, videos: Sequence[Video], shape: ClipShape, clips_per_video: int = 1) -> None:
        super().__init__(videos, shape)
        self.clips_per_video = clips_per_video

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def read(self, place: int, epoch: int, broken: list[tuple[str, str]]) -> Clip | None:  # noqa: D102
        number, clip = divmod(place, self.clips_per_video)
        video = self.videos[number]
        try:
            start = fixed_start(self.shape.num_starts(video.path), clip, self.clips_per_video)
            return Clip(self.shape.read(video.path, start), video.label, place, start)
        except BrokenClipError as error:
            broken.append((video.name, str(error)))
            return None


class ClipLoader(Loader[Any]):
    """Read batches of clips, by ``num_workers`` processes, 0 for this one.

    Names each broken video once in the log, and stops when they are more than a share of ``max_broken``.
    """

    def __init__(
        self, dataset: ClipDataset, order: TrainingOrder | HeldOutOrder, num_workers: int, max_broken: float
    ) -> None:
        super().__init__(
            dataset,
            ClipOrder(order),
            num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.num_videos, self.max_broken = len(dataset.videos), max_broken
        self.broken: dict[str, str] = {}

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        for batch, broken in super().__iter__():
            self._note(broken)
            if len(batch.labels):
                yield batch

    def _note(self, broken: list[tuple[str, str]]) -> None:
        for name, reason in broken:
            if name not in self.broken:
                self.broken[name] = reason
                logger.warning("%s is not used (%s); broken videos so far: %d", name, reason, len(self.broken))
        if len(self.broken) > self.max_broken * self.num_videos:
            first = ", ".join(f"{name} ({reason})" for name, reason in list(self.broken.items())[:3])
            raise UserError(
                f"{len(self.broken)} of {self.num_videos} videos are broken or too short, more than max_broken "
                f"{self.max_broken:g} allows: {first}{', …' if len(self.broken) > 3 else ''}; mend them, or allow more"
            )

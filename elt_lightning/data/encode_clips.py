"""Encoding clips: several of each video, at the same moments in every run."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from elt_lightning.data.clip_batches import FixedClips
from elt_lightning.data.clips import CROP, ClipShape, Video
from elt_lightning.data.crops import Crops, Picture, Request
from elt_lightning.data.encode import Encoding, Storing
from elt_lightning.data.images import ListedSource
from elt_lightning.data.workers import Loader
from elt_lightning.errors import UserError


class ClipTokenizer(Storing, Protocol):
    """What encoding clips asks of a tokenizer, such as :class:`~elt_lightning.tokenizers.video_vq.VideoVQ`."""

    def code_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the token grid (frames, rows, columns); ValueError where the size does not divide into tokens."""
        ...


class ClipSource(ListedSource):
    """Clips of videos, in random order of the videos; clip i is of video i // ``clips_per_video``.

    A part has ``samples_per_shard`` of them; see also :func:`~elt_lightning.data.clips.fixed_start`.
    """

    classes: tuple[str, ...]

    def __init__(
        self,
        videos: Sequence[Video],
        classes: tuple[str, ...],
        clips_per_video: int = 1,
        samples_per_shard: int = 2000,
        seed: int = 0,
    ) -> None:
        super().__init__(len(videos) * clips_per_video, samples_per_shard)
        self.classes, self.clips_per_video = classes, clips_per_video
        self.videos = sorted(videos, key=lambda video: hashlib.sha256(os.fsencode(f"{seed}\0{video.name}")).digest())
        listing = "".join(sorted(f"{video.name}\0{video.label}\0{_size(video.path)}\n" for video in videos))
        self.description = {
            "videos": hashlib.sha256(os.fsencode(listing)).hexdigest(),
            "clips_per_video": clips_per_video,
            "samples_per_shard": samples_per_shard,
            "seed": seed,
        }

    def picture(self, place: int) -> Picture:
        """Return a clip; its place says which one of which video it is."""
        video, clip = divmod(place, self.clips_per_video)
        name, path, label = self.videos[video]
        which = "" if self.clips_per_video == 1 else f", clip {clip + 1} of {self.clips_per_video}"
        return Picture(name + which, path, label=label, number=place)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1


class _ClipReader(Dataset[Crops]):
    def __init__(self, clips: FixedClips) -> None:
        self.clips = clips

    def __getitem__(self, request: Request) -> Crops:
        pictures: list[Picture] = []
        unreadable: list[tuple[str, str]] = []
        shape = self.clips.shape
        pixels = torch.empty((len(request.pictures), 3, shape.num_frames, shape.size, shape.size), dtype=torch.uint8)
        for picture in request.pictures:
            broken: list[tuple[str, str]] = []
            clip = self.clips.read(picture.number, epoch=0, broken=broken)
            if clip is None:
                unreadable += [(picture.source, reason) for _, reason in broken]
            else:
                pixels[len(pictures)] = clip.pixels
                name = self.clips.videos[clip.place // self.clips.clips_per_video].name
                pictures.append(picture._replace(source=f"{name}:{clip.start}"))
        return Crops(request.part, pictures, pixels[: len(pictures)], unreadable)


@dataclass(frozen=True)
class ClipEncoding(Encoding):
    """Clips, to tokens. The other attributes are those of :class:`~elt_lightning.data.encode.Encoding`."""

    source: ClipSource
    tokenizer: ClipTokenizer
    num_frames: int  # of a clip
    stride: int  # frames of the video from one frame of the clip to the next

    thing, unit = "clip", "clips/s"
    crop: str = field(default=CROP, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            shape = self.input_shape
        except ValueError as error:
            raise UserError(f"--num_frames {self.num_frames} and --size {self.size}: {error}") from error
        if self.tokenizer.codebook_size is None or len(shape) != 3:
            raise UserError("clips are encoded as tokens (frames, rows, columns): this is a tokenizer of another kind")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The token grid (frames, rows, columns)."""
        return self.tokenizer.code_shape(self.num_frames, self.size, self.size)

    @property
    def stored_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (math.prod(self.input_shape),)

    @property
    def frames(self) -> int:  # noqa: D102
        return self.num_frames

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return super().settings() | {"frames": self.num_frames, "stride": self.stride}

    def read(self, requests: Iterable[Request], num_workers: int) -> Iterator[Crops]:  # noqa: D102
        shape = ClipShape(self.num_frames, self.size, self.stride)
        clips = FixedClips(self.source.videos, shape, self.source.clips_per_video)
        yield from Loader(_ClipReader(clips), requests, num_workers)

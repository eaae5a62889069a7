"""Tokens of clips, as `elt encode ucf101` leaves them, and the clips that samples are compared with."""

import hashlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elt_lightning.data.base import VAL_LOSS
from elt_lightning.data.clip_batches import ClipBatch, ClipRequest, FixedClips
from elt_lightning.data.clips import ClipShape, Video
from elt_lightning.data.decoding import BrokenClipError, num_frames
from elt_lightning.data.encoded import EncodedDataModule
from elt_lightning.data.ucf101 import Split, list_videos
from elt_lightning.errors import UserError
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.fvd import build_video_scores
from elt_lightning.metrics.reference import ReferenceImages
from elt_lightning.metrics.video_protocols import VideoProtocol, video_protocol

CLIPS_AT_ONCE = 16


class VideoTokensDataModule(EncodedDataModule):
    """Train on encoded clips; a subclass decides how samples are judged.

    Raises:
        UserError: the shards hold no clips; see also :class:`~elt_lightning.data.encoded.EncodedDataModule`.
    """

    def clip_shape(self, stride: int) -> ClipShape:
        """Return the shape of the clips that were encoded, with frames ``stride`` apart."""
        frames = self.training_index.frames
        if frames is None:
            raise UserError(f"{self.training_shards} holds tokens of pictures, not of clips")
        return ClipShape(frames, self.training_index.image_size, stride)


class UCF101TokensDataModule(VideoTokensDataModule):
    """Tokens of UCF-101's clips; samples are judged by FVD and the Inception score of C3D, by a named protocol.

    Args:
        training_shards: folder or URL with ``index.json`` and the shards of the training clips.
        val_shards: the same of the clips that losses are measured on; None for the training clips.
        tokenizer_path: where the tokenizer's file lies; by default where it lay when the clips were encoded.
        root: folder of the videos that FVD's real clips come from, ``<Class>/v_<Class>_gXX_cYY.avi``.
        annotations: folder of ``classInd.txt``, ``trainlist0N.txt`` and ``testlist0N.txt``.
        split: N, where the protocol asks for training videos alone.
        i3d_path: I3D as TorchScript, which FVD is defined by; None measures no FVD.
        c3d_path: C3D as TorchScript, which the Inception score is defined by; None measures none.
        protocol: "styleganv-2048", "tats-2048" or "magvit-10kx4"; it says how many samples and repeats are meant.
        cache: folder of the moments of real clips.
        batch_size: global batch per optimiser step; MAGVIT's is 256.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes on each device.
        shuffle_block: samples that a loader process shuffles at once.
        seed: of the order of training samples.
    """

    def __init__(
        self,
        training_shards: str = "data/ucf101/train_tokens",
        val_shards: str | None = "data/ucf101/test_tokens",
        tokenizer_path: str | None = None,
        root: str = "data/ucf101/UCF-101",
        annotations: str = "data/ucf101/ucfTrainTestlist",
        split: int = 1,
        i3d_path: str | None = None,
        c3d_path: str | None = None,
        protocol: str = "styleganv-2048",
        cache: str = "data/cache",
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        num_workers: int = 2,
        shuffle_block: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(
            training_shards, val_shards, tokenizer_path, batch_size, micro_batch_size, num_workers, shuffle_block, seed
        )
        self.root, self.annotations, self.split, self.cache = root, annotations, split, cache
        self.i3d_path, self.c3d_path = i3d_path, c3d_path
        self.protocol = video_protocol(protocol)
        self.primary_metric = "fvd" if i3d_path is not None else "inception_score" if c3d_path is not None else VAL_LOSS
        self.higher_is_better = self.primary_metric == "inception_score"

    def prepare_data(self) -> None:
        """Load what samples are judged by, once, before training; real clips are read here."""
        self.build_metrics()

    def build_metrics(self) -> list[SampleMetric]:
        """Build ``fvd`` and ``inception_score``, each where its network was given."""
        if self.i3d_path is None and self.c3d_path is None:
            return []
        return [build_video_scores(self.protocol, self.real_clips(), self.cache, self.i3d_path, self.c3d_path)]

    def real_clips(self) -> ReferenceImages:
        """Describe the clips that the protocol compares samples with."""
        split: Split = "all" if self.protocol.split == "all" else self.split
        videos = list_videos(self.root, self.annotations, split, val=False)
        shape = self.clip_shape(self.protocol.stride)
        listing = "".join(f"{video.name}\0{os.path.getsize(video.path)}\n" for video in videos)
        return ReferenceImages(
            lambda: protocol_clips(self.protocol, videos, shape),
            hashlib.sha256(os.fsencode(listing)).hexdigest(),
            {"size": shape.size, "frames": shape.num_frames},
        )


def protocol_clips(protocol: VideoProtocol, videos: Sequence[Video], shape: ClipShape) -> Iterator[Tensor]:
    """Read the real clips of a protocol, in batches (B, 3, F, S, S) uint8."""
    windows = protocol.choose([length_of(video) for video in videos])
    for first in range(0, len(windows), CLIPS_AT_ONCE):
        part = windows[first : first + CLIPS_AT_ONCE]
        yield torch.stack([shape.read(videos[window.video].path, window.start) for window in part])


def length_of(video: Video) -> int:
    """Count the frames of a video; one that cannot be read counts 0, so no clip is taken from it."""
    try:
        return num_frames(video.path)
    except BrokenClipError:
        return 0


def read_all(videos: Sequence[Video], shape: ClipShape, clips_per_video: int) -> ClipBatch:
    """Read the same clips of each video as in every run, all into memory (UserError: one cannot be read)."""
    clips = FixedClips(videos, shape, clips_per_video)
    batch, broken = clips[ClipRequest(list(range(len(clips))))]
    if broken:
        raise UserError(f"the video {broken[0][0]} cannot be read: {broken[0][1]}")
    return batch

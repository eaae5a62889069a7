"""Protocols of FVD: which real clips samples are compared with, how many of each, and how.

FVD of one model differs between protocols, so that a number means little without its protocol's name.

Sources: github.com/universome/stylegan-v, src/metrics (``fvd2048_16f``, ``isv2048_ucf``) and issue 30 (the split);
github.com/songweige/TATS, scripts/sample_vqgan_transformer_short_videos.py and tats/data.py;
github.com/google-research/magvit, videogvt/configs/maskgvt_ucf101_config.py and videogvt/train_lib.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from elt_lightning.errors import UserError
from elt_lightning.metrics.moments import Moments, MomentSums


class Window(NamedTuple):
    """A clip of a video."""

    video: int  # the video's place in its set
    start: int  # the clip's first frame


@dataclass(frozen=True)
class VideoProtocol:
    """How FVD and the Inception score of clips are measured."""

    name: str  # stands in every result
    num_real: int  # real clips
    num_fakes: int  # samples; of another number, a score's name says how many
    repeats: int  # of the measurement, whose mean and standard deviation are reported
    split: Literal["train", "all"]  # the videos that real clips are of: "train", or "all" of train and test
    # "one of each video" at random, "again" from each video when every one has given one, or "any" of all windows of
    # all videos, so that a long video gives more
    windows: Literal["one of each video", "again", "any"]
    frames: int = 16  # of a clip
    stride: int = 1  # frames from one of a clip to its next
    seed: int = 0  # of the choice of real clips
    unbiased: bool = True  # whether covariances divide by n − 1, or by n
    tensorflow_resize: bool = False  # whether clips are resized as TensorFlow 1 did, or by I3D's file
    inception_splits: int = 1  # parts of the samples that the Inception score is the mean over

    def choose(self, lengths: Sequence[int]) -> list[Window]:
        """Choose real clips: a function of the seed and of the videos' lengths in frames, in their order.

        There are ``num_real``; fewer where a rule that takes no window twice finds no more. Videos shorter than a clip
        are passed over.

        Raises:
            UserError: fewer than two clips are there to be chosen.
        """
        starts = [max(length - (self.frames - 1) * self.stride, 0) for length in lengths]
        generator = torch.Generator().manual_seed(self.seed)
        chosen = self._any(starts, generator) if self.windows == "any" else self._of_each(starts, generator)
        if len(chosen) < 2:
            raise UserError(
                f"protocol {self.name} needs real videos of at least {(self.frames - 1) * self.stride + 1} frames: "
                f"{sum(count > 0 for count in starts)} of {len(starts)} are as long"
            )
        return chosen

    def _of_each(self, starts: list[int], generator: torch.Generator) -> list[Window]:
        """Return a random window of each video, in random order, and begin anew where the rule says so."""
        long_enough = [video for video, count in enumerate(starts) if count]
        chosen: list[Window] = []
        while long_enough and len(chosen) < self.num_real:
            for place in torch.randperm(len(long_enough), generator=generator).tolist():
                video = long_enough[place]
                chosen.append(Window(video, int(torch.randint(starts[video], (), generator=generator))))
            if self.windows == "one of each video":
                break
        return chosen[: self.num_real]

    def _any(self, starts: list[int], generator: torch.Generator) -> list[Window]:
        """Return windows, each as likely as any other and none twice."""
        ends = torch.tensor(list(accumulate(starts)), dtype=torch.int64)
        total = int(ends[-1]) if len(ends) else 0
        places = torch.randperm(total, generator=generator)[: self.num_real]
        videos = torch.searchsorted(ends, places, right=True).tolist()
        return [
            Window(video, place - int(ends[video]) + starts[video])
            for video, place in zip(videos, places.tolist(), strict=True)
        ]

    def moments(self, sums: MomentSums) -> Moments:
        """Make moments of sums, with this protocol's covariance."""
        moments, count = sums.moments(), int(sums.count)
        return moments if self.unbiased else Moments(moments.mean, moments.covariance * ((count - 1) / count))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # StyleGAN-V's code takes the first 2048 videos in order of their names; of UCF-101 these would be a few classes
        # alone. Labels of its samples are drawn as often as they are in the data.
        VideoProtocol("styleganv-2048", 2048, 2048, 1, "all", "one of each video", unbiased=False, inception_splits=10),
        # As many samples of each class. The Inception score is not in TATS' code; here it is over all samples at once.
        VideoProtocol("tats-2048", 2048, 2048, 1, "train", "any"),
        # Labels of samples are drawn as often as they are in the data. MAGVIT compares each repeat with 10,000 other
        # real clips, and neither those nor its samples are rounded to bytes; its standard deviation divides by n.
        VideoProtocol("magvit-10k×4", 10_000, 10_000, 4, "train", "again", tensorflow_resize=True),
    )
}
"""The protocols by name. Samples here are of class i mod the number of classes, whatever the source does."""


def video_protocol(name: str) -> VideoProtocol:
    """Find a protocol; "x" does for "×" (UserError: there is none of that name)."""
    for protocol in PROTOCOLS.values():
        if name in (protocol.name, protocol.name.replace("×", "x")):
            return protocol
    raise UserError(f"there is no protocol {name} of FVD: choose one of {', '.join(PROTOCOLS)}")

"""FVD and Inception score of clips, by a named protocol.

FVD: "Towards accurate generative models of video", T. Unterthiner et al., 2018.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.metrics.c3d import C3D
from elt_lightning.metrics.fid import name_with_count, next_numbers
from elt_lightning.metrics.frechet import SummingMetric, frechet_distance
from elt_lightning.metrics.i3d import I3D
from elt_lightning.metrics.inception_score import ScoreSums
from elt_lightning.metrics.moments import Moments, MomentSums, with_float64
from elt_lightning.metrics.reference import (
    InceptionMoments,
    ReferenceImages,
    cached_file,
    read_moments,
    write_moments,
)
from elt_lightning.metrics.video_protocols import VideoProtocol
from elt_lightning.training.meter import counted


@dataclass(frozen=True)
class RealClips:
    """What samples are compared with: moments of I3D's features of real clips, and how many there were."""

    moments: Moments
    count: int


class VideoScores(SummingMetric):
    """``fvd`` by I3D and ``inception_score`` by C3D, each where its network is given.

    A plain ``fvd`` is of as many samples and real clips as the protocol asks for; of another number of samples it is
    ``fvd256`` or ``fvd2.5k``. Both scores are float64 sums: they depend neither on batch size nor on the number of
    devices, up to rounding. The k-th sample that rank r of R takes in counts as number r + k·R, which is how samples
    are shared out here; sample i is in part i mod S of the Inception score's S parts.

    Args:
        protocol: how it is measured.
        i3d: reads clips for FVD.
        real: from :func:`load_or_compute_real`, with the same network and protocol.
        c3d: reads clips for the Inception score.
    """

    def __init__(
        self, protocol: VideoProtocol, i3d: I3D | None = None, real: RealClips | None = None, c3d: C3D | None = None
    ) -> None:
        super().__init__()
        if (i3d is None) != (real is None) or (i3d is None and c3d is None):
            raise ValueError("VideoScores needs I3D with the moments of real clips, or C3D, or both")
        self.protocol, self.i3d, self.real, self.c3d = protocol, i3d, real, c3d
        if i3d is not None:
            self.add_sums("features", MomentSums.zeros(I3D.num_outputs))
        if c3d is not None:
            self.add_sums("split", ScoreSums.zeros(protocol.inception_splits, C3D.num_outputs))
        networks = " and ".join(network.name for network in (i3d, c3d) if network is not None)
        self.feature_network = f"{networks}, protocol {protocol.name}"
        if real is not None and real.count != protocol.num_real:
            self.feature_network += f" with {real.count} real clips"

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """Take in clips (B, 3 or 1, F, H, W) float in [0, 1]; labels are not looked at.

        Raises:
            UserError: clips are too short for I3D, or not of the 16 frames that C3D reads.
        """
        if self.i3d is not None:
            self.sums("features").add(self.i3d.features(pixels, self.protocol.tensorflow_resize))
        if self.c3d is not None:
            scores = self.sums("split")
            parts = next_numbers(scores.counts, len(pixels)) % self.protocol.inception_splits
            scores.add(self.c3d.probabilities(pixels), parts)

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        scores = {}
        if self.real is not None:
            sums = self.sums("features")
            fakes, count = self.protocol.moments(sums), int(sums.count)
            asked = (self.protocol.num_fakes, self.protocol.num_real)
            name = "fvd" if (count, self.real.count) == asked else name_with_count(count, "fvd")
            distance = frechet_distance(self.real.moments.to(fakes.mean.device), fakes)
            scores[name] = distance.clamp(min=0)
        if self.c3d is not None:
            scores["inception_score"] = self.sums("split").score()
        return scores


def build_video_scores(
    protocol: VideoProtocol,
    clips: ReferenceImages,
    cache_folder: str | Path,
    i3d_path: str | Path | None = None,
    c3d_path: str | Path | None = None,
) -> VideoScores:
    """Build the scores that the given files allow, on a GPU where there is one; see :func:`load_or_compute_real`.

    Raises:
        UserError: neither file was given, or one is missing or wrong.
    """
    if i3d_path is None and c3d_path is None:
        raise UserError(f"FVD needs I3D, the Inception score C3D: {I3D.where()}; {C3D.where()}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    c3d = C3D.load(c3d_path) if c3d_path is not None else None
    i3d = I3D.load(i3d_path).to(device) if i3d_path is not None else None
    real = load_or_compute_real(protocol, clips, i3d, cache_folder) if i3d is not None else None
    return VideoScores(protocol, i3d, real, c3d)


def load_or_compute_real(
    protocol: VideoProtocol, clips: ReferenceImages, i3d: I3D, cache_folder: str | Path
) -> RealClips:
    """Compute the moments of real clips once, on the network's own device, and keep them.

    With several processes, let one of them call this before the others, as ``prepare_data`` of a data module does.
    Clips are those of :meth:`VideoProtocol.choose`, (B, 3 or 1, F, H, W) uint8, or float in [0, 1]. Files are named by
    the clips, the network's file and the protocol.

    Raises:
        UserError: there are fewer than two clips.
    """
    identity = [clips.fingerprint, clips.settings, i3d.sha256, asdict(protocol)]
    path = cached_file(cache_folder, "i3d_moments", identity)
    if not is_file(path):
        sums = MomentSums.zeros(I3D.num_outputs, with_float64(i3d.device))
        for batch in counted(clips.batches(), "real clip", clips.num_images):
            sums.add(i3d.features(batch.to(i3d.device), protocol.tensorflow_resize))
        count = int(sums.count)
        if count < 2:
            raise UserError(f"FVD needs at least 2 real clips, not {count}")
        moments = protocol.moments(sums).to(torch.device("cpu"))
        write_moments(path, InceptionMoments(moments, num_images=count))
        print(f"made {path}: the real clips' moments", flush=True)
    stored = read_moments(path, I3D.num_outputs)
    assert stored.num_images is not None
    return RealClips(stored.pool, stored.num_images)

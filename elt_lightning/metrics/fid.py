"""FID, sFID and Inception score of samples, from one pass of the Inception network.

Numbers are those of the ADM evaluator (github.com/openai/guided-diffusion, evaluations/evaluator.py), where samples are
written to bytes first.
"""

import torch
from torch import Tensor

from elt_lightning.metrics.frechet import SummingMetric, frechet_distance
from elt_lightning.metrics.inception import FIDInception
from elt_lightning.metrics.inception_score import ScoreSums
from elt_lightning.metrics.moments import MomentSums
from elt_lightning.metrics.reference import InceptionMoments
from elt_lightning.training.meter import rank_and_world_size

FULL_COUNT = 50_000
"""Samples behind a score called plainly FID."""

SPLIT_SIZE = 5000
"""Samples in each split of the Inception score, which is the mean over splits."""

MAX_SPLITS = 200
"""The most splits of the Inception score."""


def fid_name(count: int, name: str = "fid") -> str:
    """Name a FID after its samples: fid200, fid2k, fid2.5k; plainly fid from 50,000 up, the count of the field.

    The fewer the samples, the higher the score of the same model, so that numbers of different counts do not compare.
    """
    return name if count >= FULL_COUNT else name_with_count(count, name)


def name_with_count(count: int, name: str) -> str:
    """Put the number of samples behind the name of a score: fid200, fvd2k, fvd2.5k."""
    return f"{name}{count / 1000:g}k" if count >= 1000 else f"{name}{count}"


class InceptionScores(SummingMetric):
    """``fid`` and ``sfid``, both named by :func:`fid_name`, and ``inception_score``.

    All are float64 sums: they depend neither on batch size nor on the number of devices, up to rounding. That goes for
    the Inception score's splits too, because the k-th sample that rank r of R takes in counts as number r + k·R, which
    is how samples are shared out here; sample i is in split ⌊i / 5000⌋.

    Args:
        network: reads the samples.
        reference: moments of real images; None leaves FID and sFID out, as moments without spatial ones do sFID.
    """

    feature_network = FIDInception.name

    def __init__(self, network: FIDInception, reference: InceptionMoments | None = None) -> None:
        super().__init__()
        self.network, self.reference = network, reference
        for kind, size in (("pool", network.num_pool), ("spatial", network.num_spatial)):
            self.add_sums(kind, MomentSums.zeros(size))
        self.add_sums("split", ScoreSums.zeros(MAX_SPLITS, network.num_classes))

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """Take in pixels (B, 3 or 1, H, W) float in [0, 1]; labels are not looked at.

        Raises:
            ValueError: more than a million samples in all.
        """
        features, scores = self.network.features(pixels), self.sums("split")
        splits = next_numbers(scores.counts, len(pixels)) // SPLIT_SIZE
        if len(splits) and splits[-1] >= MAX_SPLITS:
            raise ValueError(f"the Inception score takes at most {MAX_SPLITS * SPLIT_SIZE} samples")
        self.sums("pool").add(features.pool)
        self.sums("spatial").add(features.spatial)
        scores.add(features.logits_unbiased.to(scores.entropies).softmax(1), splits)

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        scores, split = {}, self.sums("split")
        for kind, name in (("pool", "fid"), ("spatial", "sfid")):
            real = getattr(self.reference, kind, None)
            if real is not None:
                distance = frechet_distance(real.to(split.counts.device), self.sums(kind).moments())
                scores[fid_name(int(split.counts.sum()), name)] = distance.clamp(min=0)
        return scores | {"inception_score": split.score()}


def next_numbers(counts: Tensor, count: int) -> Tensor:
    """Number the next ``count`` samples of this rank, which has taken in ``counts``, over all R: r + k·R."""
    rank, world_size = rank_and_world_size()
    return rank + (counts.sum() + torch.arange(count, device=counts.device)) * world_size

"""FID, sFID and Inception score of samples, from one pass of the Inception network.

Numbers are those of the ADM evaluator (github.com/openai/guided-diffusion, evaluations/evaluator.py), where samples are
written to bytes first.
"""

import torch
import torch.distributed
from torch import Tensor

from elt_lightning.metrics.frechet import FixedPrecisionMetric, MomentSums, frechet_distance
from elt_lightning.metrics.inception import FIDInception
from elt_lightning.metrics.reference import InceptionMoments

FULL_COUNT = 50_000
"""Samples that a score called plainly FID is of."""

SPLIT_SIZE = 5000
"""Samples in each split of the Inception score, which is the mean over splits."""

MAX_SPLITS = 200
"""Splits that there is room for."""


def fid_name(count: int, name: str = "fid") -> str:
    """Name a FID after its samples: fid200, fid2k, fid2.5k; plainly fid from 50,000 up, the count of the field.

    The fewer the samples, the higher the score of the same model, so that numbers of different counts do not compare.
    """
    if count >= FULL_COUNT:
        return name
    return f"{name}{count / 1000:g}k" if count >= 1000 else f"{name}{count}"


class InceptionScores(FixedPrecisionMetric):
    """``fid`` and ``sfid``, both named by :func:`fid_name`, and ``inception_score``.

    All are float64 sums: they depend neither on batch size nor on the number of devices, up to rounding. That goes for
    the Inception score's splits too, because the k-th sample that rank r of R takes in counts as number r + k·R, which
    is how samples are shared out here; sample i is in split ⌊i / 5000⌋.

    Args:
        network: reads the samples.
        reference: moments of real images; None leaves FID and sFID out, as moments without spatial ones do sFID.
    """

    feature_network = FIDInception.name
    split_probabilities: Tensor
    split_entropies: Tensor
    split_counts: Tensor

    def __init__(self, network: FIDInception, reference: InceptionMoments | None = None) -> None:
        super().__init__()
        self.network, self.reference = network, reference
        for kind, size in (("pool", network.num_pool), ("spatial", network.num_spatial)):
            for state, zeros in vars(MomentSums.zeros(size)).items():
                self.add_state(f"{kind}_{state}", zeros, dist_reduce_fx="sum")
        shape = (MAX_SPLITS, network.num_classes)
        self.add_state("split_probabilities", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("split_entropies", torch.zeros(MAX_SPLITS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("split_counts", torch.zeros(MAX_SPLITS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """Take in pixels (B, 3 or 1, H, W) float in [0, 1]; labels are not looked at.

        Raises:
            ValueError: more than a million samples in all.
        """
        features = self.network.features(pixels)
        splits = self._splits(len(pixels))
        self._sums("pool").add(features.pool)
        self._sums("spatial").add(features.spatial)
        log_probabilities = features.logits_unbiased.to(self.split_entropies).log_softmax(1)
        probabilities = log_probabilities.exp()
        self.split_probabilities.index_add_(0, splits, probabilities)
        self.split_entropies.index_add_(0, splits, -(probabilities * log_probabilities).sum(1))
        self.split_counts.index_add_(0, splits, torch.ones_like(splits))

    def _splits(self, count: int) -> Tensor:
        """Give the splits (count,) of the next samples of this rank."""
        rank, world_size = rank_and_world_size()
        place = self.split_counts.sum() + torch.arange(count, device=self.split_counts.device)
        splits = (rank + place * world_size) // SPLIT_SIZE
        if count and splits[-1] >= MAX_SPLITS:
            raise ValueError(f"the Inception score takes at most {MAX_SPLITS * SPLIT_SIZE} samples")
        return splits

    def _sums(self, kind: str) -> MomentSums:
        return MomentSums(*(getattr(self, f"{kind}_{state}") for state in ("total", "total_outer", "count")))

    def compute(self) -> dict[str, Tensor]:  # noqa: D102
        scores = {}
        count, device = int(self.split_counts.sum()), self.split_counts.device
        for kind, name in (("pool", "fid"), ("spatial", "sfid")):
            real = getattr(self.reference, kind, None)
            if real is not None:
                distance = frechet_distance(real.to(device), self._sums(kind).moments())
                scores[fid_name(count, name)] = distance.clamp(min=0)
        return scores | {"inception_score": self._inception_score()}

    def _inception_score(self) -> Tensor:
        """Mean over splits of exp(mean KL(p‖p̄)), where mean KL(p‖p̄) = H(p̄) − mean H(p)."""
        used = self.split_counts > 0
        counts = self.split_counts[used]
        mean = self.split_probabilities[used] / counts[:, None]
        divergence = -torch.special.xlogy(mean, mean).sum(1) - self.split_entropies[used] / counts
        return divergence.exp().mean()


def rank_and_world_size() -> tuple[int, int]:
    """Say which process this is, and of how many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()

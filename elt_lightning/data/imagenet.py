"""ImageNet, or any labelled pictures, as `elt encode imagenet` leaves them: tokens or latents in WebDataset shards."""

from pathlib import Path

import torch

from elt_lightning.data.base import VAL_LOSS
from elt_lightning.data.encoded import EncodedDataModule
from elt_lightning.data.images import batches, fingerprint
from elt_lightning.errors import UserError
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.fid import InceptionScores
from elt_lightning.metrics.inception import FIDInception
from elt_lightning.metrics.reference import (
    PREPARATION,
    InceptionMoments,
    ReferenceImages,
    load_or_compute,
    read_moments,
)

REFERENCE_BATCH = 64


class ImageNetDataModule(EncodedDataModule):
    """Train on encoded pictures; judge samples by FID and Inception score.

    For the order of the pictures see :class:`~elt_lightning.data.encoded.EncodedDataModule`.

    Args:
        training_shards: folder or URL with ``index.json`` and the shards of the training pictures.
        val_shards: the same of the pictures that losses are measured on; None for the training pictures, where
            there are too few to hold any out.
        tokenizer_path: where the tokenizer's file lies; by default where it lay when the pictures were encoded.
        inception_path: Inception weights that FID is defined by, or "download"; None measures neither FID nor IS.
        reference: what FID compares with: an npz of moments, such as ADM's ``VIRTUAL_imagenet256_labeled.npz`` or what
            ``elt stats`` wrote, or a folder or tar files of real pictures; None measures the Inception score alone.
        cache: folder of the moments that were computed from pictures.
        batch_size: global batch per optimiser step; the paper's is 512.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes on each device.
        shuffle_block: samples that a loader process shuffles at once, beside the order of the shards.
        seed: of the order of training samples, their mirroring, and what is drawn from their moments.

    Raises:
        UserError: shards are missing, those of the two sets do not go together, or a reference has no Inception.
    """

    def __init__(
        self,
        training_shards: str = "data/imagenet256/train",
        val_shards: str | None = "data/imagenet256/val",
        tokenizer_path: str | None = None,
        inception_path: str | None = None,
        reference: str | None = None,
        cache: str = "data/cache",
        batch_size: int = 512,
        micro_batch_size: int | None = None,
        num_workers: int = 4,
        shuffle_block: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(
            training_shards, val_shards, tokenizer_path, batch_size, micro_batch_size, num_workers, shuffle_block, seed
        )
        if reference is not None and inception_path is None:
            raise UserError(
                f"reference {reference} is what FID compares with, and FID needs Inception: give "
                "--data.init_args.inception_path too, a file or download"
            )
        self.inception_path, self.reference, self.cache = inception_path, reference, Path(cache)
        self.primary_metric = VAL_LOSS if inception_path is None else "fid" if reference else "inception_score"
        self.higher_is_better = self.primary_metric == "inception_score"

    def prepare_data(self) -> None:
        """Load what samples are judged by, once, before training; reference pictures are read here."""
        if self.inception_path is not None:
            self.load_reference(self.load_inception())

    def load_inception(self) -> FIDInception:
        """Load Inception, on a GPU where there is one."""
        assert self.inception_path is not None
        return FIDInception.load(self.inception_path).to("cuda" if torch.cuda.is_available() else "cpu")

    def load_reference(self, network: FIDInception) -> InceptionMoments | None:
        """Return the moments that FID compares with."""
        if self.reference is None:
            return None
        root, size, crop = self.reference, self.training_index.image_size, self.training_index.crop
        made_with = {"size": size, "crop": crop}
        if root.endswith(".npz"):
            moments = read_moments(root)
            moments.check(root, made_with | {"network": network.sha256, "preparation": PREPARATION})
            return moments
        images = ReferenceImages(
            lambda: batches(root, size, REFERENCE_BATCH, self.num_workers, crop), fingerprint(root), made_with
        )
        return load_or_compute(images, network, self.cache)

    def build_metrics(self) -> list[SampleMetric]:
        """Build ``fid``, ``sfid`` and ``inception_score``, where Inception was given."""
        if self.inception_path is None:
            return []
        network = self.load_inception()
        return [InceptionScores(network, self.load_reference(network))]

"""What samples are compared with: moments of the features of real images or clips, read from a file or computed."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.files import is_file, written_aside
from elt_lightning.metrics.inception import FIDInception
from elt_lightning.metrics.moments import Moments, MomentSums, with_float64
from elt_lightning.training.meter import counted

logger = logging.getLogger(__name__)

MADE_WITH = ("size", "crop", "network", "preparation")
"""What a file of moments records of how they were made: side of the pictures, how they were brought to it, SHA-256 of
the network's weights, :data:`PREPARATION`."""

PREPARATION = "bytes, TensorFlow 1 bilinear to 299"
"""How pictures are prepared; part of the names of cached files, so that they go stale when it changes."""


@dataclass(frozen=True)
class InceptionMoments:
    """Moments of many pictures."""

    pool: Moments  # of the 2048 pooled features, for FID
    spatial: Moments | None = None  # of the 2023 spatial ones, for sFID; None where a file does not hold them
    num_images: int | None = None  # how many there were; None where a file does not record it
    # what else they depend on, by the names in `MADE_WITH`, where a file records it
    made_with: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, expected: dict[str, Any]) -> None:
        """Check that samples are prepared and read as the pictures of a file were, see :data:`MADE_WITH`.

        The log names what the file does not record.

        Raises:
            UserError: something differs.
        """
        for key, value in expected.items():
            if self.made_with.get(key, value) != value:
                raise UserError(
                    f"{name} is of pictures with {key} {self.made_with[key]}, the samples have {value}: make it anew "
                    "with `elt stats --like` and the shards that the model is trained on"
                )
        unknown = [key for key in expected if key not in self.made_with]
        if unknown:
            logger.warning(
                "%s does not say %s of its pictures: that they suit the samples is taken on trust",
                name,
                ", ".join(unknown),
            )


@dataclass(frozen=True)
class ReferenceImages:
    """Real images, or clips, that reference moments are computed from.

    Attributes:
        batches: gives the images from the first to the last: (B, 3, H, W) uint8, or float in [0, 1]; B may vary. Clips
            are (B, 3, F, H, W).
        fingerprint: identifies their content: it changes when an image is added, altered or left out.
        settings: what was done to them that changes pixels, such as the size; plain data.
        num_images: how many there are, to show how far it is; None if unknown.
    """

    batches: Callable[[], Iterable[Tensor]]
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    num_images: int | None = None


def load_or_compute(source: ReferenceImages, network: FIDInception, cache_folder: str | Path) -> InceptionMoments:
    """Compute reference moments from images once and keep them.

    With several processes, let one of them call this before the others, as ``prepare_data`` of a data module does. The
    network reads on its own device; files are named by the images, its weights and how pictures are prepared.

    Raises:
        UserError: there are fewer than two images, or the kept file is damaged.
    """
    identity = [source.fingerprint, source.settings, network.sha256, PREPARATION]
    path = cached_file(cache_folder, "inception_moments", identity)
    if not is_file(path):
        moments = compute_moments(source.batches(), network, source.num_images)
        write_moments(path, replace(moments, made_with=source.settings | moments.made_with))
        print(f"made {path}: the reference's moments", flush=True)
    return read_moments(path)


def cached_file(folder: str | Path, stem: str, identity: Any) -> Path:
    """Name a file by the SHA-256 of the plain data that its content follows from."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{stem}_{digest}.npz"


def compute_moments(
    batches: Iterable[Tensor], network: FIDInception, num_images: int | None = None
) -> InceptionMoments:
    """Compute moments of images (B, 3, H, W) uint8, or float in [0, 1], with a progress bar on a terminal.

    The network reads on its own device; ``num_images`` is how many there are, None if unknown.

    Raises:
        UserError: there are fewer than two.
    """
    device = next(network.parameters()).device
    pool, spatial = (MomentSums.zeros(size, with_float64(device)) for size in (network.num_pool, network.num_spatial))
    for images in counted(batches, "real image", num_images):
        features = network.features(images.to(device))
        pool.add(features.pool)
        spatial.add(features.spatial)
    count = int(pool.count)
    if count < 2:
        raise UserError(f"reference moments need at least 2 images, not {count}")
    cpu = torch.device("cpu")
    made_with = {"network": network.sha256, "preparation": PREPARATION}
    return InceptionMoments(pool.moments().to(cpu), spatial.moments().to(cpu), count, made_with)


def write_moments(path: str | Path, moments: InceptionMoments) -> None:
    """Write a NumPy file with the names that the ADM evaluator uses.

    They are ``mu`` (2048,) and ``sigma`` (2048, 2048) float64, of the pooled features; ``mu_s`` (2023,) and ``sigma_s``
    (2023, 2023) float64, of the spatial ones; ``num_images`` () and those of :data:`MADE_WITH` (). What is None or not
    known is left out.
    """
    arrays: dict[str, Any] = {"mu": moments.pool.mean.numpy(), "sigma": moments.pool.covariance.numpy()}
    if moments.spatial is not None:
        arrays |= {"mu_s": moments.spatial.mean.numpy(), "sigma_s": moments.spatial.covariance.numpy()}
    if moments.num_images is not None:
        arrays["num_images"] = np.array(moments.num_images)
    arrays |= {name: np.array(value) for name, value in moments.made_with.items()}
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def read_moments(path: str | Path, num_features: int | None = None) -> InceptionMoments:
    """Read moments from a file of :func:`write_moments`, or from a reference batch of the ADM evaluator.

    ``mu``, of ``num_features`` or Inception's, and ``sigma`` are required; the others are read where there are any.

    Raises:
        UserError: the file is missing, or is not such a file.
    """
    if not is_file(path):
        raise UserError(
            f"the reference moments {path} do not exist: `elt stats` makes them from images; ImageNet's are published "
            "as VIRTUAL_imagenet256_labeled.npz beside github.com/openai/guided-diffusion"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if not {"mu", "sigma"} <= names:
                raise UserError(
                    f"{path} holds no reference moments: it needs mu and sigma, and has {', '.join(sorted(names))}"
                )
            pool = _moments(path, file["mu"], file["sigma"], num_features or FIDInception.num_pool, "")
            has_spatial = {"mu_s", "sigma_s"} <= names
            spatial = (
                _moments(path, file["mu_s"], file["sigma_s"], FIDInception.num_spatial, "_s") if has_spatial else None
            )
            num_images = int(file["num_images"]) if "num_images" in names else None
            made_with = {name: file[name].item() for name in MADE_WITH if name in names}
            return InceptionMoments(pool, spatial, num_images, made_with)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a NumPy .npz file of plain arrays ({type(error).__name__}): `elt stats` makes one"
        ) from error


def _moments(path: str | Path, mean: np.ndarray, covariance: np.ndarray, size: int, suffix: str) -> Moments:
    """Check arrays, and make moments of them."""
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(
            f"{path}: mu{suffix} and sigma{suffix} have shapes {mean.shape} and {covariance.shape}, not {(size,)} and "
            f"{(size, size)}: were they made with another network?"
        )
    moments = Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())
    if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
        raise UserError(f"{path}: mu{suffix} or sigma{suffix} holds numbers that are not finite: make the file anew")
    asymmetry = (moments.covariance - moments.covariance.T).abs().max()
    if asymmetry > 1e-6 * moments.covariance.abs().max():
        raise UserError(f"{path}: sigma{suffix} is not symmetric, so it is no covariance: make the file anew")
    # With fewer samples than features some variances are 0, and rounding may put them a little below.
    slack = 1e-5 * moments.covariance.diagonal().abs().max().clamp(min=1e-12) * torch.eye(size, dtype=torch.float64)
    if torch.linalg.cholesky_ex(moments.covariance + slack).info:
        raise UserError(f"{path}: sigma{suffix} has variances below 0, so it is no covariance: make the file anew")
    return moments

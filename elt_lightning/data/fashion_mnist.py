"""Fashion-MNIST, or another data set of its format: real pictures small enough to train on in minutes.

70,000 photographs of clothes, 28×28 grey, of ten classes, 10,000 of them held out (Xiao et al. 2017, arXiv:1708.07747,
MIT licence). MNIST, KMNIST and EMNIST come as files of the same kind.
"""

import fcntl
import gzip
import hashlib
import shutil
import zlib
from collections.abc import Iterator
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from elt_lightning.data.base import Batch, IndexedDataModule, TensorBatches
from elt_lightning.data.encoded import check_same_codes
from elt_lightning.data.idx import find_halves
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.streams import HeldOutStream
from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.digits import RecognisedShare
from elt_lightning.metrics.fid import InceptionScores
from elt_lightning.metrics.frechet import FrechetDistance
from elt_lightning.metrics.inception import FIDInception
from elt_lightning.metrics.reference import ReferenceImages, load_or_compute
from elt_lightning.metrics.small_pictures import PictureNetwork, load_or_train_picture_network
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.loading import load_tokenizer

DEBIAN = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist has the files."""

DOWNLOADS = "data/fashion_mnist"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
PUBLISHED = {
    "train-images-idx3-ubyte.gz": (26421880, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte.gz": (29515, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte.gz": (4422102, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte.gz": (5148, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
"""The published files: bytes, and the SHA-256 of what they hold once they are unpacked (Debian packs them anew)."""

CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""The classes of Fashion-MNIST, in the order of their numbers."""

AT_ONCE = 1000


class FashionMNISTDataModule(IndexedDataModule):
    """Pictures as 1×H×W pixels in [−1, 1], or as the tokens that ``elt encode images`` made of the same files.

    Samples are judged against the held-out pictures, by a small network that is trained once on the training pictures
    (some minutes on a CPU) and kept: ``recognised`` is the share of samples that it reads as the class asked for,
    ``fd_fashion`` a Fréchet distance over its features.

    Args:
        root: folder of the files, or, where it holds several data sets, the file of the training pictures of one;
            "download" fetches Fashion-MNIST into ``data/fashion_mnist``; None looks there and in Debian's folder.
        training_shards: folder of the encoded training pictures; None trains on pixels.
        val_shards: folder of the encoded held-out pictures.
        tokenizer_path: where the tokenizer's file lies; by default where it lay when the pictures were encoded.
        name: of the data set, in the name of the distance.
        inception_path: Inception weights that FID is defined by, or "download"; None measures no FID.
        cache: folder of the network that judges and of the moments of held-out pictures.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes; the data are in memory, so 0 is fastest.
        seed: of the order of training samples.

    Raises:
        UserError: files are missing or damaged, or files and shards do not go together.
    """

    higher_is_better = False

    def __init__(
        self,
        root: str | None = None,
        training_shards: str | None = None,
        val_shards: str | None = None,
        tokenizer_path: str | None = None,
        name: str = "fashion",
        inception_path: str | None = None,
        cache: str = "data/cache",
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        if (training_shards is None) != (val_shards is None):
            raise UserError("give both training_shards and val_shards, or neither to train on pixels")
        if training_shards is None and tokenizer_path is not None:
            raise UserError("tokenizer_path is of encoded pictures: give their training_shards and val_shards too")
        self.name, self.inception_path, self.cache = name, inception_path, Path(cache)
        self.primary_metric = f"fd_{name}"
        self.class_names = CLOTHES if name == "fashion" else None
        self.halves = find_halves(find_root(root))
        labels, val_labels = (half.labels() for half in self.halves)
        self.num_classes = int(max(labels.max(), val_labels.max())) + 1
        self.shards = None if training_shards is None or val_shards is None else (training_shards, val_shards)
        self.tokenizer_path = tokenizer_path
        if self.shards is None:
            self.input_shape = (1, *self.images(val=True).shape[1:])
        else:
            self.input_shape, self.codebook_size = self.index.input_shape, self.index.codebook_size

    def images(self, val: bool) -> Tensor:
        """Return the pictures (n, H, W) uint8 of one half."""
        return self._pictures[val].x

    @cached_property
    def _pictures(self) -> tuple["Pictures", "Pictures"]:
        training, val = (Pictures(half.images(), half.labels()) for half in self.halves)
        for half, pictures in zip(self.halves, (training, val), strict=True):
            if len(pictures.x) != len(pictures.labels) or not len(pictures.x):
                raise UserError(f"{half.path} has {len(pictures.x)} pictures and {len(pictures.labels)} labels")
        if training.x.shape[1:] != val.x.shape[1:]:
            raise UserError(f"{self.halves[0].path} and {self.halves[1].path} hold pictures of different sizes")
        return training, val

    @cached_property
    def index(self) -> ShardIndex:
        """What the shards of the training pictures hold, once both sets were found to go together."""
        assert self.shards is not None
        training, val = (ShardIndex.read(location) for location in self.shards)
        check_same_codes(self.shards[0], training, self.shards[1], val)
        for location, index, half in zip(self.shards, (training, val), self.halves, strict=True):
            if index.codebook_size is None or index.copies != 1:
                raise UserError(f"{location} must hold tokens, and without mirror images: encode the pictures anew")
            expected = (self.num_classes, len(half.labels()))
            if (len(index.classes), index.num_samples) != expected:
                raise UserError(
                    f"{location} holds {index.num_samples} pictures of {len(index.classes)} classes, and {half.path} "
                    f"{expected[1]} of {expected[0]}: encode it with `elt encode images --root {half.path}`"
                )
        return training

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer: of the shards, or the scaling of pixels."""
        return PixelScaling() if self.shards is None else load_tokenizer(self.index.tokenizer, self.tokenizer_path)

    def tokenizer_description(self) -> dict[str, Any]:
        """Describe the tokenizer; training on tokens does not load it."""
        return super().tokenizer_description() if self.shards is None else self.index.tokenizer

    def prepare_data(self) -> None:
        """Make what samples are judged by, once."""
        self.build_metrics()

    def training_set(self) -> TensorBatches:  # noqa: D102
        return self._samples(val=False)

    def val_set(self) -> TensorBatches:  # noqa: D102
        return self._samples(val=True)

    def _samples(self, val: bool) -> TensorBatches:
        if self.shards is None:
            return self._pictures[val]
        location = self.shards[val]
        batches = list(HeldOutStream(location, ShardIndex.read(location), AT_ONCE).batches(reader=0))
        return TensorBatches(torch.cat([batch.x for batch in batches]), torch.cat([batch.labels for batch in batches]))

    def load_network(self) -> PictureNetwork:
        """Load the network that names classes, training it where there is no cached one for these pictures."""
        training, val = self._pictures
        path = self.cache / f"{self.name}_network_{fingerprint(training)[:16]}.safetensors"
        halves = (training.x, training.labels), (val.x, val.labels)
        return load_or_train_picture_network(path, *halves, self.num_classes)

    def build_metrics(self) -> list[SampleMetric]:
        """Build ``recognised`` and ``fd_fashion``, and FID with the Inception score where Inception was given."""
        network = self.load_network()
        distance = FrechetDistance(self.primary_metric, network, f"{self.name}_network")
        distance.set_reference(part / 255 for part in self._real())
        metrics: list[SampleMetric] = [RecognisedShare(network), distance]
        if self.inception_path is not None:
            inception = FIDInception.load(self.inception_path).to("cuda" if torch.cuda.is_available() else "cpu")
            val = self._pictures[True]
            images = ReferenceImages(self._real, fingerprint(val), {"half": "held-out"}, len(val.x))
            metrics.append(InceptionScores(inception, load_or_compute(images, inception, self.cache)))
        return metrics

    def _real(self) -> Iterator[Tensor]:
        """Return the held-out pictures, batch by batch: (B, 1, H, W) uint8."""
        return iter(self.images(val=True)[:, None].split(AT_ONCE))


class Pictures(TensorBatches):
    """Pictures kept as bytes (n, H, W), and handed out as 1×H×W pixels in [−1, 1]."""

    def __getitem__(self, indices: Tensor) -> Batch:
        batch = super().__getitem__(indices)
        return batch._replace(x=PixelScaling().encode(batch.x[:, None] / 255))


def fingerprint(pictures: Pictures) -> str:
    """Hash pictures and labels: 64 hexadecimal digits."""
    digest = hashlib.sha256(str(tuple(pictures.x.shape)).encode())
    for values in (pictures.x, pictures.labels):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def find_root(root: str | None) -> str:
    """Return the folder of the files that a setting means.

    Raises:
        UserError: none is meant, and Fashion-MNIST is nowhere that it is looked for; or it cannot be downloaded.
    """
    if root == "download":
        download(Path(DOWNLOADS))
        return DOWNLOADS
    if root is not None:
        return root
    for folder in (DOWNLOADS, DEBIAN):
        if all(is_file(Path(folder) / name) for name in PUBLISHED):
            return folder
    raise UserError(
        f"Fashion-MNIST is neither in {DOWNLOADS} nor in {DEBIAN}: --data.init_args.root=download fetches it, Debian's "
        "package dataset-fashion-mnist has it, or name the folder of its four files as root"
    )


def download(folder: Path) -> None:
    """Fetch the published files of Fashion-MNIST that a folder lacks, going on where an earlier try ended.

    Several processes may do this at once: one fetches, the others wait for it.

    Raises:
        UserError: there is no internet, or what came is not the published file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, (size, content) in PUBLISHED.items():
            path, part = folder / name, folder / f"{name}.part"
            if is_file(path):
                continue
            try:
                fetch(f"{URL}/{name}", part, size)
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"{URL}/{name} cannot be downloaded ({error}): try again, which goes on, or fetch it by hand into "
                    f"{folder}"
                ) from error
            if found := unlike(part, size, content):
                part.unlink()
                raise UserError(f"{URL}/{name} is not the published file, {found}: try again, or fetch it elsewhere")
            part.rename(path)
            print(f"made {path}: downloaded, {size:,} bytes", flush=True)


def fetch(url: str, part: Path, size: int) -> None:
    """Download a file of ``size`` bytes, of which a part may be there already (OSError: it does not come whole)."""
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        return
    request = Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urlopen(request, timeout=60) as answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        shutil.copyfileobj(answer, file)  # status 200 sends it from the beginning
    if (done := part.stat().st_size) < size:
        raise OSError(f"{done:,} of {size:,} bytes came")


def unlike(path: Path, size: int, content: str) -> str:
    """Return in what a gzipped file differs from the published one; an empty text for nothing."""
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes in place of {size:,}"
    try:
        with gzip.open(path) as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == content
    except (OSError, EOFError, zlib.error) as error:
        return f"it cannot be unpacked ({error})"
    return "" if same else "its SHA-256 differs"

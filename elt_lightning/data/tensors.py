"""Tensors on disk: images, latents or tokens of one's own, in safetensors files."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elt_lightning.data.base import VAL_LOSS, Batch, BatchDataset, IndexedDataModule, TensorBatches
from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.continuous import PixelScaling


class TensorDataModule(IndexedDataModule):
    """Train on safetensors files: each holds ``x`` and ``labels`` (N,), integers in [0, num_classes).

    ``x`` is (N, C, H, W) of floats about as large as standard normal noise, for diffusion; or (N, T) of integers in
    [0, codebook_size), for masked generation. Files are mapped into memory: what is not read takes no room. There is
    no metric of samples: loop counts are compared by their held-out loss.

    Args:
        training_files: what to train on, taken as one set.
        val_files: what losses are measured on, taken as one set.
        num_classes: number of classes.
        codebook_size: size of the tokens' codebook; None for floats.
        tokenizer: turns ``x`` into pixels for pictures. Floats of 1 or 3 channels are pixels in [−1, 1] unless given.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes, to read from a slow disk while the device computes.
        seed: of the order of training samples.

    Raises:
        UserError: a file is missing or holds something else, or the settings do not go with what it holds.
    """

    primary_metric = VAL_LOSS
    higher_is_better = False

    def __init__(
        self,
        training_files: list[str],
        val_files: list[str],
        num_classes: int,
        codebook_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        self.num_classes, self.codebook_size = num_classes, codebook_size
        self._training_set = TensorFiles(training_files)
        self.input_shape = self._training_set.sample_shape
        self._val_set = TensorFiles(val_files, like=self._training_set)
        is_tokens = len(self.input_shape) == 1
        if is_tokens != (codebook_size is not None):
            raise UserError("codebook_size must be given for tokens, x (N, T), and only for them")
        for files in (self._training_set, self._val_set):
            files.check_range("labels", num_classes, "num_classes")
            if codebook_size is not None:
                files.check_range("x", codebook_size, "codebook_size")
        if tokenizer is None and (is_tokens or self.input_shape[0] not in (1, 3)):
            raise UserError(
                f"samples of shape {self.input_shape} are no pixels: name what decodes them in data.init_args.tokenizer"
            )
        self._tokenizer = tokenizer or PixelScaling()

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        return self._tokenizer

    def training_set(self) -> BatchDataset:  # noqa: D102
        return self._training_set

    def val_set(self) -> BatchDataset:  # noqa: D102
        return self._val_set

    def build_metrics(self) -> list[SampleMetric]:
        """Return none: nothing is known by which samples could be judged."""
        return []


class TensorFiles(BatchDataset):
    """Safetensors files of ``x`` and ``labels``, one after the other, as one data set.

    Args:
        paths: the files, at least one.
        like: another set, whose samples must have the same shape.

    Raises:
        UserError: a file is missing, is of another kind, or differs from the others.
    """

    def __init__(self, paths: Sequence[str], like: "TensorFiles | None" = None) -> None:
        if not paths:
            raise UserError("neither training_files nor val_files may be empty")
        self.paths = list(paths)
        self.parts = [open_tensors(path) for path in paths]
        expected = (like or self).parts[0].x
        for path, part in zip(paths, self.parts, strict=True):
            if (part.x.shape[1:], part.x.dtype) != (expected.shape[1:], expected.dtype):
                raise UserError(f"{path}: x is {_kind(part.x)}, but {_kind(expected)} in {(like or self).paths[0]}")
        self.sample_shape = tuple(expected.shape[1:])
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader process maps the files again; the tensors themselves would be copied to it.
        return TensorFiles, (self.paths,)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, indices: Tensor) -> Batch:
        """Fetch samples (B,) from the files that hold them, in the order asked for."""
        numbers = torch.searchsorted(self.ends, indices, right=True)  # B, which file
        places = [(numbers == number).nonzero()[:, 0] for number in range(len(self.parts))]
        found = [
            part[indices[place] - (end - len(part))]
            for part, place, end in zip(self.parts, places, self.ends, strict=True)
        ]
        back = torch.cat(places).argsort()
        return Batch(
            torch.cat([batch.x for batch in found])[back], torch.cat([batch.labels for batch in found])[back], indices
        )

    def check_range(self, name: str, count: int, setting: str) -> None:
        """Check that all values of ``x`` or ``labels`` lie in [0, count) (UserError: they do not)."""
        for path, part in zip(self.paths, self.parts, strict=True):
            values = getattr(part, name)
            lowest, highest = int(values.min()), int(values.max())
            if lowest < 0 or highest >= count:
                raise UserError(f"{path}: {name} lie from {lowest} to {highest}, but {setting} is {count}")


def open_tensors(path: str) -> TensorBatches:
    """Map a file's ``x`` and ``labels`` into memory (UserError: the file is missing or holds something else)."""
    if not is_file(path):
        raise UserError(f"the data file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {"x", "labels"} <= names:
                raise UserError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}: it needs x and labels")
            x, labels = file.get_tensor("x"), file.get_tensor("labels")
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    is_latents, is_tokens = x.ndim == 4 and x.is_floating_point(), x.ndim == 2 and _holds_integers(x)
    if not (is_latents or is_tokens) or labels.shape != x.shape[:1] or not _holds_integers(labels) or not x.numel():
        raise UserError(
            f"{path}: x is {_kind(x)} and labels {_kind(labels)}; needed are x (N, C, H, W) of floats or (N, T) of "
            "integers, and labels (N,) of integers, each of type int8 to int64 or uint8"
        )
    return TensorBatches(x, labels)


def _holds_integers(x: Tensor) -> bool:
    return x.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"

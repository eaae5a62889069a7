"""What every data module of this project shares: batches whose order is a function of (seed, step)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elt_lightning.data.workers import Loader
from elt_lightning.errors import UserError, check_most
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.processes.noise import Stream, random_bits, sample_seeds
from elt_lightning.tokenizers.base import Tokenizer


class Batch(NamedTuple):
    """One batch."""

    x: Tensor  # tokens (B, T) int64, or latents (B, C, H, W) float
    labels: Tensor  # (B,) int64
    # (B,) int64, each sample's place in its data set; the noise a sample meets in training is keyed by it
    indices: Tensor


class Request(NamedTuple):
    """Samples that are asked for."""

    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, each sample's number; with the seed it decides the sample
    # (B, …) what is given of each sample and must stay, as in `Sampler.sample`; None for nothing
    known: Tensor | None = None
    loops: int | None = None  # loop count to draw them at; None for the model's L_max


class Requests(Dataset[Request]):
    """Samples 0 … n − 1, indexed by a whole batch of numbers at once, as a data module's ``request`` asks for them.

    They are drawn at ``loops``, None for the model's L_max.
    """

    def __init__(self, num_samples: int, request: Callable[[Tensor], Request], loops: int | None = None) -> None:
        self.num_samples, self.request, self.loops = num_samples, request, loops

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, numbers: list[int]) -> Request:
        return self.request(torch.tensor(numbers))._replace(loops=self.loops)


VAL_LOSS = "loss"
"""The primary metric of data that have none of their own: the held-out loss of each loop count."""


class BatchDataset(Dataset[Batch]):
    """Samples 0 … n − 1, indexed by a whole batch of places (B,) int64 at once."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the samples."""

    @abstractmethod
    def __getitem__(self, indices: Tensor) -> Batch:
        """Fetch samples; ``indices`` of the batch are the places asked for."""


class TensorBatches(BatchDataset):
    """Codes and labels held in memory, or mapped into it."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, indices: Tensor) -> Batch:
        x = self.x[indices]
        return Batch(x if x.is_floating_point() else x.long(), self.labels[indices].long(), indices)


class TrainingOrder(Sampler[list[int]]):
    """Which samples make up each micro-batch of this rank: a function of (seed, optimiser step, rank, world size).

    They are plain numbers, in every order here: tensors would go to loader processes through shared memory; where that
    is full, Python drops the request, and both sides wait for ever.

    Every epoch is one shuffle, cut into equal global batches; what does not fill a batch is left out of that epoch. A
    global batch is the same set of samples for every number of ranks and micro-batches. Each pass asks the trainer
    where to begin, so that a resumed run goes on with the very batch that was next.

    Args:
        num_samples: size of the data set, at least ``batch_size``.
        batch_size: global batch, samples per optimiser step.
        micro_batch_size: samples per forward pass of this rank.
        rank: this process.
        world_size: number of processes.
        seed: of the shuffles.
        current_step: returns the optimiser steps done so far.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        current_step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.num_samples, self.batch_size, self.micro_batch_size = num_samples, batch_size, micro_batch_size
        self.rank, self.world_size, self.seed, self.current_step = rank, world_size, seed, current_step

    def __len__(self) -> int:
        """Count the micro-batches of a whole epoch."""
        return self.num_samples // self.batch_size * (self.batch_size // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first_step = divmod(self.current_step(), self.num_samples // self.batch_size)
        seeds = sample_seeds(self.seed, torch.arange(self.num_samples))
        order = random_bits(seeds, epoch, Stream.DATA_ORDER, 1)[:, 0].argsort(stable=True)
        share = self.micro_batch_size * self.world_size
        for batch in range(first_step * self.batch_size // share, len(self)):
            yield order[batch * share : (batch + 1) * share][self.rank :: self.world_size].tolist()


class HeldOutOrder(Sampler[list[int]]):
    """A rank's share of samples 0 … n − 1 in order, every one once over all ranks; the last batch may be smaller."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.mine, self.batch_size = range(rank, num_samples, world_size), batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.mine) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield list(self.mine[start : start + self.batch_size])


class AskedByNumbers(Dataset[Batch]):
    """A data set that is asked for lists of places."""

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, places: list[int]) -> Batch:
        return self.dataset[torch.tensor(places)]


class BatchedDataModule(LightningDataModule):
    """Splits a global batch over devices, and over the forward passes of each.

    Args:
        batch_size: global batch per optimiser step, whatever the number of devices.
        micro_batch_size: samples per forward pass on one device; the rest is accumulated. None: no accumulation.
        num_workers: loader processes.
        seed: of the order of training samples; linked to ``seed_everything``.
    """

    def __init__(self, batch_size: int, micro_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or (micro_batch_size is not None and micro_batch_size < 1):
            raise ValueError(
                f"batch sizes must be at least 1 and num_workers at least 0, not {batch_size}, {num_workers}"
            )
        check_most(num_workers=num_workers)
        self.batch_size, self.micro_batch_size, self.num_workers, self.seed = (
            batch_size,
            micro_batch_size,
            num_workers,
            seed,
        )

    def tokenizer_description(self) -> dict[str, Any]:
        """Describe the tokenizer of the data, as :meth:`Tokenizer.description` does; nothing where they are pixels."""
        return {}

    def training_micro_batch(self, trainer: Trainer) -> int:
        """Return the samples of a forward pass of one device in training.

        Raises:
            UserError: the trainer accumulates another number of them than make up a batch.
        """
        micro_batch_size, accumulation = self.share_batch(trainer.world_size)
        if trainer.accumulate_grad_batches != accumulation:
            raise UserError(
                f"a batch of {self.batch_size} is {accumulation} of {micro_batch_size} on each device: tell the "
                f"trainer so, as `elt fit` does, Trainer(accumulate_grad_batches={accumulation})"
            )
        return micro_batch_size

    def share_batch(self, world_size: int) -> tuple[int, int]:
        """Split the global batch: samples per forward pass of one device, and how many passes are accumulated."""
        per_device, remainder = divmod(self.batch_size, world_size)
        micro_batch_size = min(self.micro_batch_size or per_device, per_device)
        if remainder or micro_batch_size < 1 or per_device % micro_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} does not split into {world_size} devices times micro-batches of "
                f"{self.micro_batch_size or per_device}: choose a batch_size that is a multiple of both"
            )
        return micro_batch_size, per_device // micro_batch_size

    def val_batch_size(self, num_samples: int, world_size: int) -> int:
        """Return the samples of a pass of validation on one device.

        Raises:
            UserError: a device would have none, would skip validation, and the others would wait for it for ever.
        """
        if num_samples < world_size:
            raise UserError(f"{num_samples} held-out samples do not suffice for {world_size} devices: use fewer")
        return self.share_batch(world_size)[0]

    def training_order(self, num_samples: int) -> TrainingOrder:
        """Return the order of a training set, in micro-batches.

        Raises:
            UserError: there are fewer samples than in a global batch.
        """
        trainer = self.trainer
        assert trainer is not None
        micro_batch_size = self.training_micro_batch(trainer)
        if num_samples < self.batch_size:
            raise UserError(
                f"the training set has {num_samples} samples, fewer than batch_size {self.batch_size}: "
                f"--data.init_args.batch_size={num_samples} or less"
            )
        return TrainingOrder(
            num_samples,
            self.batch_size,
            micro_batch_size,
            trainer.global_rank,
            trainer.world_size,
            self.seed,
            lambda: trainer.global_step,
        )

    def val_order(self, num_samples: int) -> HeldOutOrder:
        """Return the order of a set that losses are measured on (UserError: there are fewer samples than devices)."""
        assert self.trainer is not None
        micro_batch_size = self.val_batch_size(num_samples, self.trainer.world_size)
        return HeldOutOrder(num_samples, micro_batch_size, self.trainer.global_rank, self.trainer.world_size)


class GenerativeDataModule(BatchedDataModule, ABC):
    """Codes to train on, the tokenizer that gives them meaning, and the metrics that judge samples.

    The arguments are those of :class:`BatchedDataModule`.

    Attributes:
        num_classes: number of classes.
        class_names: their names in the order of their numbers, None where they have none.
        input_shape: the token grid (height, width), or latents (channels, height, width).
        codebook_size: codebook size, None for continuous latents.
        primary_metric: the score that matters most, of :meth:`build_metrics` or :data:`VAL_LOSS`.
        higher_is_better: its direction.
    """

    num_classes: int
    class_names: Sequence[str] | None = None
    input_shape: tuple[int, ...]
    codebook_size: int | None = None
    primary_metric: str
    higher_is_better: bool

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer; usable after :meth:`setup`."""

    @abstractmethod
    def build_metrics(self) -> list[SampleMetric]:
        """Build the metrics of this data, references included, on the CPU."""

    @abstractmethod
    def all_codes(self, val: bool, batch_size: int) -> Iterator[Tensor]:
        """Yield all training samples once, or all held-out ones, in the order they are kept in: codes (B, …)."""

    def tokenizer_description(self) -> dict[str, Any]:
        """Describe the tokenizer, as :meth:`Tokenizer.description` does."""
        return self.tokenizer.description()

    def state_dict(self) -> dict[str, Any]:
        """Put into checkpoints which tokenizer the codes are of."""
        return {"tokenizer": self.tokenizer_description()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on the codes of another tokenizer.

        Raises:
            UserError: it was, or does not say what it was trained on.
        """
        if not (isinstance(state_dict, dict) and isinstance(state_dict.get("tokenizer"), dict)):
            raise UserError("the checkpoint does not say which tokenizer it was trained on: it is damaged")
        there, here = state_dict["tokenizer"], self.tokenizer_description()
        if any(there.get(name) != here.get(name) for name in ("class_path", "sha256")):
            raise UserError(
                f"the checkpoint was trained on codes of another tokenizer, {there}, than that of these data, {here}"
            )

    def test_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return self.val_dataloader()

    def request(self, indices: Tensor) -> Request:
        """Return what is asked of the samples with these numbers (B,): sample i is of class i mod ``num_classes``."""
        return Request(indices % self.num_classes, indices)

    def request_samples(self, num_samples: int, batch_size: int, loops: int | None = None) -> None:
        """Set what :meth:`predict_dataloader` asks for: how many samples, how many at once, at which loop count."""
        self._requests, self._request_batch_size = Requests(num_samples, self.request, loops), batch_size

    def predict_dataloader(self) -> DataLoader[Request]:  # noqa: D102
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        order = HeldOutOrder(len(self._requests), self._request_batch_size, rank, world_size)
        return DataLoader(self._requests, sampler=order, batch_size=None)


def data_of(trainer: Trainer) -> GenerativeDataModule:
    """Return a trainer's data module; Lightning gives the attribute no type."""
    return cast(GenerativeDataModule, cast(Any, trainer).datamodule)


class IndexedDataModule(GenerativeDataModule):
    """Data whose samples can be fetched in any order: global batches are the same on any number of devices."""

    @abstractmethod
    def training_set(self) -> BatchDataset:
        """Return the samples to train on."""

    @abstractmethod
    def val_set(self) -> BatchDataset:
        """Return the samples that validation and test losses are measured on."""

    def all_codes(self, val: bool, batch_size: int) -> Iterator[Tensor]:  # noqa: D102
        dataset = self.val_set() if val else self.training_set()
        return (dataset[places].x for places in torch.arange(len(dataset)).split(batch_size))

    def train_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        dataset = self.training_set()
        return self._loader(dataset, self.training_order(len(dataset)))

    def val_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        dataset = self.val_set()
        return self._loader(dataset, self.val_order(len(dataset)))

    def _loader(self, dataset: BatchDataset, order: TrainingOrder | HeldOutOrder) -> DataLoader[Batch]:
        return Loader(
            AskedByNumbers(dataset),
            order,
            self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

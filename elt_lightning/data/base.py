"""What every data module of this project shares: batches whose order is a function of (seed, epoch), and nothing hidden."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elt_lightning.errors import UserError
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.tokenizers.base import Tokenizer


class Batch(NamedTuple):
    """One batch.

    Attributes:
        x: tokens (B, T) int64, or latents (B, C, H, W) float.
        labels: (B,) int64.
        index: (B,) int64, each sample's place in its data set; the noise a sample meets in training is keyed by it.
    """

    x: Tensor
    labels: Tensor
    index: Tensor


class Request(NamedTuple):
    """Samples that are asked for.

    Attributes:
        labels: (B,) int64.
        index: (B,) int64, each sample's number; with the seed it decides the sample.
    """

    labels: Tensor
    index: Tensor


class Requests(Dataset[Request]):
    """Samples 0 … n − 1, sample i of class i mod ``num_classes``; indexed by a whole batch of numbers at once."""

    def __init__(self, num_samples: int, num_classes: int) -> None:
        self.num_samples, self.num_classes = num_samples, num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: Tensor) -> Request:  # type: ignore[override]
        return Request(index % self.num_classes, index)


class TensorBatches(Dataset[Batch]):
    """Codes and labels held in memory; indexed by a whole batch of places at once."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Batch:  # type: ignore[override]
        x = self.x[index]
        return Batch(x if x.is_floating_point() else x.long(), self.labels[index].long(), index)


class BatchOrder(Sampler[Tensor]):
    """Which samples make up each micro-batch of this rank: a function of (seed, epoch, rank, world size).

    Every epoch is one shuffle, cut into equal global batches; what does not fill a batch is left out of that epoch. A
    global batch is the same set of samples for every number of ranks and micro-batches.

    Args:
        num_samples: size of the data set.
        batch_size: global batch, samples per optimiser step.
        micro_batch_size: samples per forward pass of this rank.
        rank: this process.
        world_size: number of processes.
        seed: of the shuffle; None keeps the stored order, with the last, smaller batch.
    """

    def __init__(
        self, num_samples: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int, seed: int | None
    ) -> None:
        self.num_samples, self.batch_size, self.micro_batch_size = num_samples, batch_size, micro_batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_batch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; Lightning calls this before every epoch."""
        self.epoch = epoch

    def skip_to(self, micro_batch: int) -> None:
        """Begin the next pass, and that one alone, at this micro-batch: where a run was interrupted."""
        self.first_batch = micro_batch

    def __len__(self) -> int:
        if self.seed is None:
            return -(-self.num_samples // (self.micro_batch_size * self.world_size))
        return self.num_samples // self.batch_size * (self.batch_size // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[Tensor]:
        first, self.first_batch = self.first_batch, 0
        if self.seed is None:
            order = torch.arange(self.num_samples)
        else:
            # Lightning's own seeds are below 2³²: the epoch stands above them.
            generator = torch.Generator().manual_seed(self.seed + (self.epoch << 32))
            order = torch.randperm(self.num_samples, generator=generator)
        share = self.micro_batch_size * self.world_size
        for batch in range(first, len(self)):
            yield order[batch * share : (batch + 1) * share][self.rank :: self.world_size]


class GenerativeDataModule(LightningDataModule, ABC):
    """Codes to train on, the tokenizer that gives them meaning, and the metrics that judge samples.

    Args:
        batch_size: global batch per optimiser step, whatever the number of devices.
        micro_batch_size: samples per forward pass on one device; the rest is accumulated. None: no accumulation.
        num_workers: loader processes.
        seed: of the order of training samples; linked to ``seed_everything``.

    Attributes:
        num_classes: number of classes.
        input_shape: the token grid (height, width), or latents (channels, height, width).
        num_codes: codebook size, None for continuous latents.
        primary_metric: the score that matters most.
        higher_is_better: its direction.
    """

    num_classes: int
    input_shape: tuple[int, ...]
    num_codes: int | None = None
    primary_metric: str
    higher_is_better: bool

    def __init__(self, batch_size: int, micro_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or (micro_batch_size is not None and micro_batch_size < 1):
            raise ValueError(f"batch sizes must be at least 1 and num_workers at least 0, not {batch_size}, {num_workers}")
        self.batch_size, self.micro_batch_size, self.num_workers, self.seed = batch_size, micro_batch_size, num_workers, seed

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer; usable after :meth:`setup`."""

    @abstractmethod
    def training_set(self) -> TensorBatches:
        """What is trained on."""

    @abstractmethod
    def held_out_set(self) -> TensorBatches:
        """What validation and test losses are measured on."""

    @abstractmethod
    def build_metrics(self) -> list[SampleMetric]:
        """Build the metrics of this data, references included, on the CPU."""

    def train_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        trainer = self.trainer
        assert trainer is not None
        micro_batch_size, accumulation = self._share_batch(trainer.world_size)
        trainer.accumulate_grad_batches = accumulation
        dataset = self.training_set()
        if len(dataset) < self.batch_size:
            raise UserError(f"the training set has {len(dataset)} samples, fewer than batch_size {self.batch_size}")
        order = BatchOrder(
            len(dataset), self.batch_size, micro_batch_size, trainer.global_rank, trainer.world_size, self.seed
        )
        # On resuming inside an epoch, Lightning has restored its progress by now: go on where it stopped.
        order.skip_to(trainer.fit_loop.epoch_loop.batch_progress.current.completed)
        return self._loader(dataset, order)

    def val_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        assert self.trainer is not None
        micro_batch_size, _ = self._share_batch(self.trainer.world_size)
        dataset = self.held_out_set()
        order = BatchOrder(
            len(dataset), self.batch_size, micro_batch_size, self.trainer.global_rank, self.trainer.world_size, None
        )
        return self._loader(dataset, order)

    def test_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return self.val_dataloader()

    def request_samples(self, num_samples: int, batch_size: int) -> None:
        """Say what :meth:`predict_dataloader` shall ask for: how many samples, drawn how many at once on one device."""
        self._requests, self._request_batch_size = Requests(num_samples, self.num_classes), batch_size

    def predict_dataloader(self) -> DataLoader[Request]:  # noqa: D102
        assert self.trainer is not None
        size, world_size = self._request_batch_size, self.trainer.world_size
        order = BatchOrder(len(self._requests), size * world_size, size, self.trainer.global_rank, world_size, None)
        return DataLoader(self._requests, sampler=order, batch_size=None)

    def _loader(self, dataset: TensorBatches, order: BatchOrder) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _share_batch(self, world_size: int) -> tuple[int, int]:
        """Split the global batch: samples per forward pass of one device, and how many passes are accumulated."""
        per_device, remainder = divmod(self.batch_size, world_size)
        micro_batch_size = min(self.micro_batch_size or per_device, per_device)
        if remainder or micro_batch_size < 1 or per_device % micro_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} does not split into {world_size} devices times micro-batches of "
                f"{self.micro_batch_size or per_device}: choose a batch_size that is a multiple of both"
            )
        return micro_batch_size, per_device // micro_batch_size

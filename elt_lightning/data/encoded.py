"""Codes that `elt encode` wrote, streamed from shards: the reader of every data set of encoded pictures or clips."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from elt_lightning.data.base import Batch, GenerativeDataModule
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.streams import HeldOutStream, ShardLoader, TrainingStream
from elt_lightning.errors import UserError
from elt_lightning.processes.noise import Stream, normal, sample_seeds
from elt_lightning.tokenizers.base import Tokenizer
from elt_lightning.tokenizers.loading import load_tokenizer


class EncodedDataModule(GenerativeDataModule):
    """Train on encoded samples; a subclass decides how samples are judged.

    Order: with the same seed, batch size, number of devices and loader processes, batches are the same in every run,
    and a run that resumes in the middle of an epoch goes on with the batch that was next. With other numbers of devices
    or loader processes it goes on in another order: in the epoch that was interrupted some samples then come twice and
    others not at all; from the next epoch on every one comes once again. Every device gets equally many batches; what
    does not fill a global batch is left out of an epoch, other samples in each. What a sample meets in training, its
    noise and masks, depends on none of this.

    Args:
        training_shards: folder or URL with ``index.json`` and the shards of the training samples.
        val_shards: the same of the samples that losses are measured on; None for the training samples, where there
            are too few to hold any out.
        tokenizer_path: where the tokenizer's file lies; by default where it lay when the samples were encoded.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes on each device.
        shuffle_block: samples that a loader process shuffles at once, beside the order of the shards.
        seed: of the order of training samples, their mirroring, and what is drawn from their moments.

    Raises:
        UserError: shards are missing, or those of the two sets do not go together.
    """

    def __init__(
        self,
        training_shards: str,
        val_shards: str | None,
        tokenizer_path: str | None,
        batch_size: int,
        micro_batch_size: int | None,
        num_workers: int,
        shuffle_block: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        if shuffle_block < 1:
            raise ValueError(f"shuffle_block must be at least 1, not {shuffle_block}")
        self.training_shards, self.val_shards = training_shards, val_shards or training_shards
        self.tokenizer_path, self.shuffle_block = tokenizer_path, shuffle_block
        self.training_index, self.val_index = (
            ShardIndex.read(location) for location in (self.training_shards, self.val_shards)
        )
        check_same_codes(self.training_shards, self.training_index, self.val_shards, self.val_index)
        self.class_names = self.training_index.classes
        self.num_classes = len(self.class_names)
        self.input_shape, self.codebook_size = self.training_index.input_shape, self.training_index.codebook_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer, loaded when it is first asked for: training itself does not need it."""
        return load_tokenizer(self.training_index.tokenizer, self.tokenizer_path)

    def tokenizer_description(self) -> dict[str, Any]:
        """Describe the tokenizer, as the index does."""
        return self.training_index.tokenizer

    def train_dataloader(self) -> ShardLoader:  # noqa: D102
        trainer = self.trainer
        assert trainer is not None
        micro_batch_size = self.training_micro_batch(trainer)
        if self.training_index.num_samples < self.batch_size:
            raise UserError(
                f"{self.training_shards} holds {self.training_index.num_samples} samples, fewer than batch_size "
                f"{self.batch_size}: --data.init_args.batch_size={self.training_index.num_samples} or less"
            )
        stream = TrainingStream(
            **self._place(self.training_shards, self.training_index, micro_batch_size),
            global_batch_size=self.batch_size,
            seed=self.seed,
            shuffle_block=self.shuffle_block,
        )
        return ShardLoader(stream, lambda: trainer.global_step)

    def val_dataloader(self) -> ShardLoader:  # noqa: D102
        assert self.trainer is not None
        batch_size = self.val_batch_size(self.val_index.num_samples, self.trainer.world_size)
        return ShardLoader(HeldOutStream(**self._place(self.val_shards, self.val_index, batch_size)))

    def all_codes(self, val: bool, batch_size: int) -> Iterator[Tensor]:  # noqa: D102
        location, index = self.training_shards, self.training_index
        if val:
            location, index = self.val_shards, self.val_index
        for batch in HeldOutStream(location, index, batch_size).batches(reader=0):
            yield self.codes(batch.x, sample_seeds(self.seed, batch.indices), step=0)

    def _place(self, location: str, index: ShardIndex, batch_size: int) -> dict[str, Any]:
        """Return the settings that both kinds of streams have."""
        assert self.trainer is not None
        return {
            "location": location,
            "index": index,
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
        }

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn what is stored into what the model takes, on its device: int64 tokens, or float32 latents."""
        if not isinstance(batch, Batch):
            return batch
        assert self.trainer is not None
        step = self.trainer.global_step if self.trainer.training else 0
        return batch._replace(x=self.codes(batch.x, sample_seeds(self.seed, batch.indices), step))

    def codes(self, stored: Tensor, seeds: Tensor, step: int) -> Tensor:
        """Turn stored tokens (B, T), latents (B, C, H, W) or moments (B, 2·C, H, W) into tokens or latents.

        Latents of moments are drawn, anew at every step: scale · (mean + std·ε).
        """
        if self.codebook_size is not None:
            return stored.long()
        if self.training_index.latent_scale is None:
            return stored.float()
        mean, std = stored.float().chunk(2, dim=1)
        noise = normal(seeds, step, Stream.POSTERIOR, tuple(mean.shape[1:]))
        return self.training_index.latent_scale * (mean + std * noise)


def check_same_codes(first: str, one: ShardIndex, second: str, other: ShardIndex) -> None:
    """Check that two sets hold the same classes, in codes of the same tokenizer (UserError: they do not)."""
    for name in ("classes", "image_size", "crop", "input_shape", "stored_shape", "codebook_size", "latent_scale"):
        here, there = getattr(one, name), getattr(other, name)
        if here != there:
            described = (f"{len(here)} and {len(there)}, or in another order",) if name == "classes" else (here, there)
            raise UserError(f"{first} and {second} differ in {name}: {' and '.join(map(str, described))}")
    if any(one.tokenizer.get(name) != other.tokenizer.get(name) for name in ("class_path", "sha256")):
        raise UserError(f"{first} and {second} were encoded by different tokenizers")
    if len(one.stored_shape) not in (1, 3) or torch.Size(one.stored_shape).numel() < 1:
        raise UserError(f"{first}: codes of shape {one.stored_shape} are neither tokens nor latents")

"""Reading shards as a stream: all ranks get equally many batches, no picture comes twice, and resuming is exact.

The shards of an epoch, in the epoch's order, are one long row of samples. It is cut into equal stretches, one for each
loader process of each rank, wherever the cuts fall; a process reads the shards that its stretch touches. Within its
stretch a process shuffles blocks of samples. What comes when is thus a function of (seed, epoch, number of ranks,
loader processes and samples per forward pass), so a reader that knows how many batches are done goes on without reading
what came before, except in the shard and block where it stopped.
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from elt_lightning.data.base import Batch
from elt_lightning.data.shards import Shard, ShardIndex, check_local, checksum, join
from elt_lightning.data.workers import Loader
from elt_lightning.errors import UserError
from elt_lightning.files import parse_json, whole_number
from elt_lightning.processes.noise import Stream, random_bits, sample_seeds

T = TypeVar("T")


class Sample(NamedTuple):
    """One picture of a shard."""

    copies: np.ndarray  # (copies, …) as stored: the picture, and its mirror image where that was asked for
    label: int  # its class
    number: int  # its place in the data set


class Stretch(NamedTuple):
    """Samples [start, stop) of the row."""

    start: int
    stop: int


@dataclass
class ShardStream(IterableDataset[Batch]):
    """The batches of one rank; split over loader processes by itself.

    Batches hold codes as they are stored: int16 tokens (B, T), or float16 latents or moments (B, channels, H, W).
    """

    location: str  # folder or URL of the shards
    index: ShardIndex  # what is there
    batch_size: int  # samples per batch
    num_workers: int = 0  # loader processes of each rank; 0 reads in the rank itself
    rank: int = 0  # this process
    world_size: int = 1  # number of processes

    @property
    def readers(self) -> int:
        """Count who reads for this rank."""
        return max(self.num_workers, 1)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        yield from self.batches(worker.id if worker else 0)

    def batches(self, reader: int) -> Iterator[Batch]:
        """Return the batches of one loader process."""
        raise NotImplementedError

    def read(self, shards: list[Shard], stretch: Stretch) -> Iterator[Sample]:
        """Read a stretch of the row that these shards make."""
        first = 0
        for shard in shards:
            start, stop = max(stretch.start - first, 0), min(stretch.stop - first, shard.num_samples)
            if start < stop:
                yield from read_shard(self.location, shard, self.index, start, stop)
            first += shard.num_samples

    def collate(self, samples: list[Sample], copies: Tensor) -> Batch:
        """Stack samples, taking the copy (B,) asked for of each (UserError: a token is not in the codebook)."""
        chosen = np.stack([sample.copies[copy] for sample, copy in zip(samples, copies.tolist(), strict=True)])
        if self.index.codebook_size is not None and not 0 <= chosen.min() <= chosen.max() < self.index.codebook_size:
            place, *_ = np.argwhere((chosen < 0) | (chosen >= self.index.codebook_size))[0]
            raise UserError(
                f"{self.location}: sample {samples[place].number} has codes from {chosen[place].min()} to "
                f"{chosen[place].max()}, but there are "
                f"{self.index.codebook_size}: its shard is damaged or of another set"
            )
        labels, numbers = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("label", "number"))
        return Batch(torch.from_numpy(chosen), labels, numbers)


@dataclass
class TrainingStream(ShardStream):
    """One epoch in training, shuffled; it begins where :attr:`first_step` says."""

    global_batch_size: int = 1  # samples per optimiser step over all ranks
    seed: int = 0  # of the shuffles
    shuffle_block: int = 2048  # samples that a loader process shuffles at once: more mix better and take more memory
    first_step: int = 0  # optimiser steps done so far, of all epochs

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; what does not fill a global batch is left out of it."""
        return self.index.num_samples // self.global_batch_size

    def __len__(self) -> int:
        """Count the batches of this rank in a whole epoch."""
        return self.steps_per_epoch * self._batches_per_step

    @property
    def _batches_per_step(self) -> int:
        return self.global_batch_size // (self.batch_size * self.world_size)

    def batches(self, reader: int) -> Iterator[Batch]:
        """Return what is left of the epoch; readers take turns, so a resumed epoch begins with the next one."""
        epoch, step = divmod(self.first_step, self.steps_per_epoch)
        done = step * self._batches_per_step
        turn = (reader + done) % self.readers
        mine, mine_done = self._taken(len(self), turn), self._taken(done, turn)
        batches_before = self.rank * len(self) + sum(self._taken(len(self), other) for other in range(turn))
        stretch = Stretch(batches_before * self.batch_size, (batches_before + mine) * self.batch_size)
        samples = self._shuffled(epoch, stretch, mine_done * self.batch_size)
        for _ in range(mine - mine_done):
            batch = list(islice(samples, self.batch_size))
            seeds = sample_seeds(self.seed, torch.tensor([sample.number for sample in batch]))
            yield self.collate(batch, random_bits(seeds, epoch, Stream.MIRRORED, 1)[:, 0] % self.index.copies)

    def _taken(self, batches: int, reader: int) -> int:
        """Count the batches of one reader among the first ``batches`` of an epoch."""
        return (batches - reader + self.readers - 1) // self.readers

    def _shuffled(self, epoch: int, stretch: Stretch, done: int) -> Iterator[Sample]:
        """Return the samples of a stretch, block by block in random order, without the first that are done."""
        keys = sample_seeds(self.seed, torch.arange(len(self.index.shards)))
        order = random_bits(keys, epoch, Stream.SHARD_ORDER, 1)[:, 0].argsort(stable=True)
        shards = [self.index.shards[place] for place in order.tolist()]
        block = self.shuffle_block
        begin = stretch.start + done // block * block
        samples = self.read(shards, Stretch(begin, stretch.stop))
        for first in range(begin, stretch.stop, block):
            read = list(islice(samples, block))
            positions = torch.arange(first, first + len(read))
            shuffle = random_bits(sample_seeds(self.seed, positions), epoch, Stream.DATA_ORDER, 1)[:, 0].argsort()
            for place in shuffle.tolist()[max(stretch.start + done - first, 0) :]:
                yield read[place]


@dataclass
class HeldOutStream(ShardStream):
    """Every sample once over all ranks, as it was stored, never mirrored; last batches may be smaller."""

    def __len__(self) -> int:
        """Count the batches of this rank."""
        stretches = [self._stretch(reader) for reader in range(self.readers)]
        return sum(math.ceil((stop - start) / self.batch_size) for start, stop in stretches)

    def _stretch(self, reader: int) -> Stretch:
        place, places = self.rank * self.readers + reader, self.world_size * self.readers
        total = self.index.num_samples
        return Stretch(place * total // places, (place + 1) * total // places)

    def batches(self, reader: int) -> Iterator[Batch]:
        """Return this reader's share."""
        samples = self.read(list(self.index.shards), self._stretch(reader))
        while batch := list(islice(samples, self.batch_size)):
            yield self.collate(batch, torch.zeros(len(batch), dtype=torch.int64))


class ShardLoader(Loader[Batch]):
    """Loads a stream; an epoch of training begins at the optimiser step that the trainer is at, ``current_step()``."""

    def __init__(self, stream: ShardStream, current_step: Callable[[], int] = lambda: 0) -> None:
        super().__init__(
            stream,
            None,
            stream.num_workers,
            prefetch_factor=8 if stream.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        self.stream, self.current_step = stream, current_step

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if isinstance(self.stream, TrainingStream):
            self.stream.first_step = self.current_step()
        return super().__iter__()


def read_shard(location: str, shard: Shard, index: ShardIndex, start: int, stop: int) -> Iterator[Sample]:
    """Read samples [start, stop) of a shard.

    Raises:
        UserError: the shard is missing or damaged, or holds something else than its index says. The checksum reveals
            swapped samples once the last one is reached.
    """
    url, again = join(location, shard.name), "delete it and run the same `elt encode` again"
    count = crc = 0
    try:
        check_local(url)
        samples = iter(webdataset.tarfile_to_samples()([{"url": url}]))
        for count, members in enumerate(samples, start=1):
            sample = read_sample(members, index) if count > start else None
            if shard.crc32 is not None:
                crc = checksum(crc, members["__key__"], members.get("codes.npy", b""), members.get("json", b""))
            if count == shard.num_samples and (crc != (shard.crc32 or 0) or next(samples, None)):
                raise ValueError("it holds other samples than were encoded into it")
            if sample is not None:
                yield sample
            if count == stop:
                return
    except Exception as error:  # the libraries raise anything on damaged bytes
        told = error.strerror if isinstance(error, OSError) else error.args[0] if error.args else ""
        reason = f"{type(error).__name__} {told}"
        raise UserError(f"{url} cannot be read near sample {count} ({reason}): {again}") from error
    raise UserError(f"{url} is damaged, it ends after {count} of {shard.num_samples} samples: {again}")


def read_sample(members: dict[str, Any], index: ShardIndex) -> Sample:
    """Decode the members of one sample.

    Raises:
        ValueError: they are not what the index says, or a member is missing or damaged; it is named.
    """
    copies = read_member(members, "codes.npy", read_npy)
    if copies.shape != (index.copies, *index.stored_shape):
        raise ValueError(f"the codes have shape {copies.shape}, the index says {(index.copies, *index.stored_shape)}")
    if copies.dtype.kind not in ("iu" if index.codebook_size is not None else "f"):
        raise ValueError(f"the codes are of type {copies.dtype}")
    if copies.dtype.kind == "f" and not np.isfinite(copies).all():
        raise ValueError("the codes are not all finite")
    label = read_member(members, "json", lambda content: whole_number(parse_json(content)["label"]))
    if not 0 <= label < len(index.classes):
        raise ValueError(f"label {label} is none of the {len(index.classes)} classes")
    return Sample(copies, label, int(members["__key__"]))


def read_member(members: dict[str, Any], ending: str, read: Callable[[bytes], T]) -> T:
    """Decode one member of a sample (ValueError: it is missing, or cannot be decoded)."""
    name = f"{members['__key__']}.{ending}"
    if ending not in members:
        raise ValueError(f"there is no {name}")
    try:
        return read(members[ending])
    except Exception as error:  # NumPy's parser raises anything on damaged bytes
        raise ValueError(f"{name}: {error}") from error


def read_npy(content: bytes) -> np.ndarray:
    """Read an array, never a pickle, from the bytes of a .npy file of version 1.

    Raises:
        ValueError: they are something else.
    """
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, dtype = npy_layout(content[:start])
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)


@lru_cache(maxsize=64)
def npy_layout(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Parse the header of a .npy file, shape and type; all samples of a shard have the same.

    Raises:
        ValueError: it is no header, or one of an array that is pickled or in Fortran's order.
    """
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("the codes are no .npy file of version 1")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or fortran_order:
        raise ValueError("the codes are pickled, which allow_pickle=False forbids, or in Fortran's order")
    return shape, dtype

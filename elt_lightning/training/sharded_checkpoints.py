"""Checkpoints that are folders: every device writes its own part, and any number of devices reads them.

A folder holds what a checkpoint file would, its tensors apart: they are in ``*.distcp`` and listed in ``.metadata``, as
torch.distributed.checkpoint writes them, and ``meta.pt`` has the rest. It takes its name when all of it is written.
Reading runs no code from the files.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from elt_lightning.errors import UserError
from elt_lightning.training.weights import META


def write_folder(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint, all devices together; sharded tensors are written in parts, others once."""
    tensors: dict[str, Tensor] = {}

    def take(place: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        tensors[place] = value
        return None  # stands where it was

    rest = _mapped(checkpoint, take)
    aside = folder.with_name(f".{folder.name}")
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        aside.mkdir(parents=True)
        torch.save(rest, aside / META)
    dist.barrier()
    distributed_checkpoint.save(tensors, checkpoint_id=aside)
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    dist.barrier()


def read_folder(
    folder: Path, sharded: Mapping[str, Tensor] | None = None, prefixes: tuple[str, ...] = ("",)
) -> dict[str, Any]:
    """Read a checkpoint as :func:`write_folder` was given it.

    Args:
        folder: where it is.
        sharded: {place: a tensor sharded as the one to read}, where all devices read together; what lies below a place
            and has its shape is read alike. Without it this process reads every tensor whole.
        prefixes: read only tensors whose place begins with one of these; the others are None.

    Raises:
        UserError: it is not such a folder, or is damaged.
    """
    try:
        rest = torch.load(folder / META, map_location="cpu", weights_only=True)
        reader = _Reader(folder)
        listed = reader.read_metadata().state_dict_metadata
        tensors = {
            place: _empty(about, sharded or {}, place)
            for place, about in listed.items()
            if isinstance(about, TensorStorageMetadata) and place.startswith(prefixes)
        }
        if tensors:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is intended
                distributed_checkpoint.load(tensors, storage_reader=reader, no_dist=sharded is None)
    except Exception as error:  # the readers raise anything on damaged bytes
        raise UserError(f"{folder} is not a readable checkpoint: it is damaged or of another kind") from error
    checkpoint: dict[str, Any] = _mapped(rest, lambda place, value: tensors.get(place) if value is None else value)
    return checkpoint


def _mapped(value: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """Change the leaves of nested data, each by its place, such as "optimizer_states/0/state/3/exp_avg"."""
    if isinstance(value, Mapping):
        return {name: _mapped(inner, change, f"{place}/{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(inner, change, f"{place}/{number}") for number, inner in enumerate(value))
    return change(place.removeprefix("/"), value)


def _empty(about: TensorStorageMetadata, sharded: Mapping[str, Tensor], place: str) -> Tensor:
    like = sharded.get(place, sharded.get(place.rpartition("/")[0]))
    if like is not None and like.shape == about.size:
        return torch.empty_like(like, dtype=about.properties.dtype)
    return torch.empty(about.size, dtype=about.properties.dtype)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``, a pickle, without running what it may hold."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            listed: Metadata = _PlainUnpickler(file).load()
        return listed


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint lists tensors with, and nothing else."""

    KNOWN: ClassVar = {
        "torch.distributed.checkpoint.metadata": set(metadata.__all__) | {"_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
        "pathlib": {"PosixPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)

"""Encoded images or clips on disk: WebDataset shards, and the index that says what they hold.

A folder holds ``00000.tar``, ``00001.tar``, … and ``index.json``. A sample of a shard is two members,

    <number>.codes.npy   (copies, …) what :meth:`Tokenizer.store` gave: the picture, then its mirror image if asked
    <number>.json        {"label": class number, "source": path of the picture below its root; of a clip, path:start}

where the number, nine digits or ten, below 2³², is the sample's own in the whole data set: unique, and the same whoever
encoded it, but with gaps. Beside them lie ``encode.json`` and a small file per shard, with which ``elt encode`` goes on
after an interruption (:mod:`elt_lightning.data.encode`); readers need neither.
"""

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import webdataset

from elt_lightning.errors import UserError
from elt_lightning.files import check_regular, parse_json, whole_number, write_json

INDEX = "index.json"
FORMAT_VERSION = 1

CHECKED = 4096
"""Bytes of a sample's codes that enter its shard's checksum: all of tokens, a quarter of ImageNet's latents."""


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str  # of the file, beside the index
    num_samples: int  # pictures in it
    # `checksum` of its samples, by which a reader knows them from those of another shard; None in sets that were
    # encoded before it was kept
    crc32: int | None = None


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds."""

    classes: tuple[str, ...]  # names of the classes, in the order of their numbers
    image_size: int  # height and width of the pictures, in pixels
    copies: int  # 1, or 2 where each picture's mirror image is there too
    # the token grid (rows, columns), or the latents' (channels, rows, columns); of clips, the token grid (frames, rows,
    # columns)
    input_shape: tuple[int, ...]
    # of what is kept of one copy: (tokens,), or (channels, rows, columns) with twice the channels where
    # ``latent_scale`` is set
    stored_shape: tuple[int, ...]
    codebook_size: int | None  # codebook size, None for latents
    latent_scale: float | None  # as in `ImageTokenizer`
    tokenizer: dict[str, Any]  # its description: ``class_path``, ``init_args``, and the ``sha256`` of its file
    crop: str  # how pictures were brought to their size
    shards: tuple[Shard, ...]  # the files, in order
    unreadable: tuple[str, ...] = field(default=())  # pictures that were skipped
    version: int = FORMAT_VERSION  # of this format
    frames: int | None = None  # of a clip, before it became tokens; None for pictures

    @property
    def num_samples(self) -> int:
        """Count the pictures of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def write(self, folder: str | Path) -> None:
        """Write ``index.json``; it appears whole or not at all."""
        write_json(Path(folder) / INDEX, {"num_samples": self.num_samples} | asdict(self))

    @staticmethod
    def read(location: str) -> "ShardIndex":
        """Read the index of a folder or URL (UserError: there is none, or it is not one of ours)."""
        where = join(location, INDEX)
        try:
            check_local(where)
            with webdataset.gopen(where) as file:
                content = parse_json(file.read())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where} cannot be read ({error}): `elt encode` writes it when the last shard is done"
            ) from error
        try:
            return _parsed(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where} is not an index of `elt encode`: {type(error).__name__} {error}") from error


def join(location: str, name: str) -> str:
    """Return the path or URL of a file in a folder."""
    return f"{location.rstrip('/')}/{name}"


def check_local(url: str) -> None:
    """Refuse a path that is no file, as a FIFO is; URLs are left alone (OSError: it is missing, or no file)."""
    if urlparse(url).scheme in ("", "file"):
        check_regular(urlparse(url).path)


def checksum(so_far: int, number: str, codes: bytes, about: bytes) -> int:
    """Add a sample's number and members, as they are stored, to the CRC-32 of those before it; the first gets 0.

    Only the first :data:`CHECKED` bytes of codes count: they tell samples apart, and more would slow reading down.
    """
    for part in (number.encode(), codes[:CHECKED], about):
        so_far = zlib.crc32(part, so_far)
    return so_far


def _parsed(content: dict[str, Any]) -> ShardIndex:
    if whole_number(content["version"]) > FORMAT_VERSION:
        raise ValueError(f"it was written by a newer elt_lightning (version {content['version']})")
    shards = tuple(
        Shard(
            str(shard["name"]),
            whole_number(shard["num_samples"]),
            None if shard.get("crc32") is None else whole_number(shard["crc32"]),
        )
        for shard in content["shards"]
    )
    if any("/" in shard.name or shard.num_samples < 0 for shard in shards):
        raise ValueError("a shard's name has a slash or its count is negative")
    twice = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if twice:
        raise ValueError(f"it names the shard {twice[0]} more than once")

    def numbers(name: str) -> tuple[int, ...]:
        return tuple(_from_1(number) for number in content[name])

    def from_1_or_none(name: str) -> int | None:
        return None if content.get(name) is None else _from_1(content[name])

    index = ShardIndex(
        classes=_strings(content["classes"]),
        image_size=_from_1(content["image_size"]),
        copies=_from_1(content["copies"]),
        input_shape=numbers("input_shape"),
        stored_shape=numbers("stored_shape"),
        codebook_size=from_1_or_none("codebook_size" if "codebook_size" in content else "num_codes"),  # its old name
        latent_scale=None if content["latent_scale"] is None else float(content["latent_scale"]),
        tokenizer=dict(content["tokenizer"]),
        crop=str(content["crop"]),
        shards=shards,
        unreadable=_strings(content["unreadable"]),
        frames=from_1_or_none("frames"),
    )
    if index.stored_shape != _stored_shape(index):
        raise ValueError(f"codes of shape {index.stored_shape} do not make up {index.input_shape}")
    if whole_number(content.get("num_samples", index.num_samples)) != index.num_samples:
        raise ValueError(f"it says {content['num_samples']} samples, and its shards have {index.num_samples}")
    return index


def _from_1(value: Any) -> int:
    if whole_number(value) < 1:
        raise ValueError(f"{value} is below 1")
    return value


def _stored_shape(index: ShardIndex) -> tuple[int, ...]:
    """Derive the shape of what is kept of one copy: tokens in a row, latents as they are, or mean and deviation."""
    if index.codebook_size is not None:
        return (math.prod(index.input_shape),)
    channels, *grid = index.input_shape
    return (channels if index.latent_scale is None else 2 * channels, *grid)


def _strings(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)

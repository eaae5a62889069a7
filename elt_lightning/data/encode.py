"""Encoding pictures or clips into shards, so that what was finished survives whatever happens.

The output folder holds, beside the shards and the index of :mod:`elt_lightning.data.shards`:

    encode.json   the settings that decide the content; a run with others is refused
    00000.json    for each finished shard: how many pictures, which were unreadable

Everything is written under another name first. A shard without its small file is made anew, byte for byte the same.
"""

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from elt_lightning.data.crops import Crops, Picture, Request, chunks
from elt_lightning.data.images import ImageSource
from elt_lightning.data.shards import Shard, ShardIndex, checksum
from elt_lightning.errors import UserError
from elt_lightning.files import parse_json, whole_number, write_json, written_aside

SETTINGS = "encode.json"
SETTINGS_VERSION = 1

FEW = 1000
"""The share of unreadable pictures is taken of at least this many: one bad file among the first ten says little about
the rest."""


@dataclass
class FinishedShard:
    """What is known of a shard."""

    num_samples: int = 0  # pictures in it
    highest_label: int = -1  # the highest class number in it, −1 where it is empty
    unreadable: list[str] = field(default_factory=list)  # pictures that were skipped
    crc32: int | None = None  # `checksum` of its samples; None where an earlier version made it

    def __post_init__(self) -> None:
        """Check what may come from a damaged file."""
        whole_number(self.num_samples)
        whole_number(self.highest_label)
        whole_number(self.crc32 or 0)
        if not (isinstance(self.unreadable, list) and all(isinstance(name, str) for name in self.unreadable)):
            raise ValueError(f"{self.unreadable} is no list of names")


class ShardFolder:
    """The folder that shards are written to, by several processes at once, each its own shards; it is made.

    Raises:
        UserError: the folder holds something else, or shards of other settings than these plain data.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps({"version": SETTINGS_VERSION} | settings))
        try:
            # Another process may begin here at the same time: it writes its settings before any other visible file.
            others = [entry for entry in path.iterdir() if entry.name[0] != "."] if path.exists() else []
            if not (path / SETTINGS).exists():
                if others:
                    raise UserError(f"{path} holds files that `elt encode` did not write: choose another --output")
                write_json(path / SETTINGS, settings)
        except OSError as error:
            raise UserError(f"{path} cannot be written to: {error.strerror}") from error
        self.settings = self._begun_with(settings)

    def _begun_with(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Read the settings that the folder was begun with, and compare."""
        try:
            found = parse_json((self.path / SETTINGS).read_text())
            if not isinstance(found, dict):
                raise ValueError("it holds no settings")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / SETTINGS} cannot be read ({error}): choose another --output") from error
        for name in {**found, **settings}:
            before, now = _without_path(found.get(name)), _without_path(settings.get(name))
            if before != now:
                values = f" ({before}, now {now})" if _is_short(before) and _is_short(now) else ""
                raise UserError(
                    f"{self.path} was begun with other {name}{values}: go on with the same, or choose another --output"
                )
        return found

    def finished(self, number: int) -> FinishedShard | None:
        """Read what is known of a shard, None where it is not finished."""
        if not self._tar(number).is_file():
            return None
        try:
            return FinishedShard(**parse_json(self._tar(number).with_suffix(".json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @contextmanager
    def writing(self, number: int) -> Iterator["ShardWriter"]:
        """Write one shard; it takes its name, replacing what had it, when the block succeeds.

        What a killed process left of this shard is removed.

        Raises:
            UserError: it cannot be written.
        """
        path = self._tar(number)
        for leftover in (path.with_suffix(".json"), *self.path.glob(f".{path.stem}.*")):
            leftover.unlink(missing_ok=True)
        try:
            with written_aside(path) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                writer = ShardWriter(tar)
                yield writer
            write_json(path.with_suffix(".json"), asdict(writer.finished), indent=None)
        except FileNotFoundError as error:
            raise UserError(
                f"what was written of {path} is gone: another process writes it too, give each its own --shard"
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

    def _tar(self, number: int) -> Path:
        return self.path / shard_name(number)


def shard_name(number: int) -> str:
    """Name a shard's file."""
    return f"{number:05d}.tar"


class ShardWriter:
    """Puts samples into a tar; equal samples make equal bytes, for no time and no user is noted."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar, self.finished = tar, FinishedShard()

    def add(self, picture: Picture, codes: np.ndarray) -> None:
        """Put in one sample: ``codes`` (copies, …)."""
        stream = io.BytesIO()
        np.lib.format.write_array(stream, codes, allow_pickle=False)
        number, about = f"{picture.number:09d}", json.dumps({"label": picture.label, "source": picture.source}).encode()
        for ending, content in (("codes.npy", stream.getvalue()), ("json", about)):
            member = tarfile.TarInfo(f"{number}.{ending}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.finished.crc32 = checksum(self.finished.crc32 or 0, number, stream.getvalue(), about)
        self.finished.num_samples += 1
        self.finished.highest_label = max(self.finished.highest_label, picture.label)

    def skip(self, names: Iterable[str]) -> None:
        """Note pictures that could not be read."""
        self.finished.unreadable.extend(names)


class Storing(Protocol):
    """What encoding asks of a tokenizer; see :class:`~elt_lightning.tokenizers.base.ImageTokenizer`."""

    codebook_size: int | None

    def store(self, pixels: Tensor) -> Tensor: ...  # noqa: D102

    def description(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Encoding(ABC):
    """What is encoded, with what, and how: all that decides the content of the shards.

    Attributes:
        source: the pictures, or clips; each of its parts becomes one shard.
        tokenizer: in eval mode, on the device that is to do the work.
        size: height and width of the crops, in pixels.
        mirrored: keep the codes of each picture's mirror image too.
        thing: what one of them is called.
        unit: of speed.
        frames: of a clip; None for pictures.
        latent_scale: of the tokenizer; None for tokens.

    Raises:
        UserError: the size does not suit the tokenizer, or its codes do not fit the format.
    """

    source: ImageSource
    tokenizer: Storing
    size: int
    mirrored: bool

    thing: ClassVar[str]
    unit: ClassVar[str]

    def __post_init__(self) -> None:
        if (self.tokenizer.codebook_size or 0) > 2**15:
            raise UserError(f"shards keep tokens in 16 bits: {self.tokenizer.codebook_size} codes are too many")

    @property
    @abstractmethod
    def crop(self) -> str:
        """How they are brought to their size."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The token grid, or the latents' shape."""

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what is kept of one copy."""

    @property
    def frames(self) -> int | None:  # noqa: D102
        return None

    @property
    def latent_scale(self) -> float | None:  # noqa: D102
        return None

    @abstractmethod
    def read(self, requests: Iterable[Request], num_workers: int) -> Iterator[Crops]:
        """Decode and crop, in the order of the requests; they are taken as they are needed."""

    def settings(self) -> dict[str, Any]:
        """Describe in plain data what decides the content of the shards."""
        return {
            "tokenizer": self.tokenizer.description(),
            "size": self.size,
            "mirrored": self.mirrored,
            "crop": self.crop,
            "classes": self.source.classes,
        } | self.source.description

    def run(
        self,
        folder: ShardFolder,
        parts: Sequence[int],
        batch_size: int,
        num_workers: int,
        device: torch.device,
        max_unreadable: float,
    ) -> Generator[Crops, None, None]:
        """Encode parts of the source, each into the shard of its number, and yield each batch once it is encoded.

        What was there of these parts is replaced. Codes depend on ``batch_size`` by rounding at most. ``num_workers``
        processes decode, 0 for this one; the device is the tokenizer's.

        Raises:
            UserError: more than a share of ``max_unreadable`` of the pictures tried here cannot be read, the source is
                damaged, or memory or disk are full. Finished shards stay.
        """
        failures: list[UserError] = []
        crops_of_parts = self.read(self._requests(parts, batch_size, failures), num_workers)
        unreadable: list[str] = []
        num_tried = 0
        for part, batches in groupby(crops_of_parts, key=lambda crops: crops.part):
            with folder.writing(part) as writer:
                for crops in batches:
                    if crops.pictures:
                        codes = self._checked(encode_pixels(crops.pixels.to(device), self.tokenizer, self.mirrored))
                        for picture, sample in zip(crops.pictures, codes, strict=True):
                            writer.add(picture, sample)
                    writer.skip(name for name, _ in crops.unreadable)
                    yield crops
                    num_tried += crops.num_tried
                    unreadable += [f"{name} ({reason})" for name, reason in crops.unreadable]
                    check_share(unreadable, max(num_tried, FEW), max_unreadable, self.thing)
        if failures:
            raise failures[0]

    def _requests(self, parts: Sequence[int], batch_size: int, failures: list[UserError]) -> Iterator[Request]:
        """Cut parts into batches, at least one for each; a damaged part ends it, once those before it are done."""
        for part in parts:
            try:
                pictures = self.source.part(part)
            except UserError as error:  # requests run ahead: raised here, it would stop the part before this one
                failures.append(error)
                return
            for chunk in chunks(pictures, batch_size) if pictures else ([],):
                yield Request(part, chunk)

    def _checked(self, codes: np.ndarray) -> np.ndarray:
        if codes.shape[2:] != self.stored_shape:
            raise UserError(f"the tokenizer gives codes of shape {codes.shape[2:]}, not {self.stored_shape} as it says")
        if not np.isfinite(codes).all():
            raise UserError("the tokenizer gives codes that are not finite: its file is damaged or does not suit it")
        return codes

    def write_index(self, folder: ShardFolder, max_unreadable: float) -> ShardIndex | None:
        """Write ``index.json`` if all shards are finished, whoever made them; None if some are missing.

        Several processes may do this at once: all write the same. Empty shards are left out.

        Raises:
            UserError: more than a share of ``max_unreadable`` of all pictures cannot be read, or none can.
        """
        finished = [(number, folder.finished(number)) for number in range(self.source.num_parts)]
        shards = {number: shard for number, shard in finished if shard is not None}
        unreadable = tuple(name for shard in shards.values() for name in shard.unreadable)
        num_samples = sum(shard.num_samples for shard in shards.values())
        is_complete = len(shards) == self.source.num_parts
        num_tried = num_samples + len(unreadable)
        check_share(unreadable, num_tried if is_complete else max(num_tried, FEW), max_unreadable, self.thing)
        if not is_complete:
            return None
        if not num_samples:
            raise UserError(f"there was not one {self.thing} that could be read: {folder.path} gets no index")
        highest = max(shard.highest_label for shard in shards.values())
        index = ShardIndex(
            classes=self.source.classes or tuple(str(number) for number in range(highest + 1)),
            image_size=self.size,
            copies=2 if self.mirrored else 1,
            input_shape=self.input_shape,
            stored_shape=self.stored_shape,
            codebook_size=self.tokenizer.codebook_size,
            latent_scale=self.latent_scale,
            tokenizer=folder.settings["tokenizer"],
            crop=self.crop,
            shards=tuple(
                Shard(shard_name(number), shard.num_samples, shard.crc32)
                for number, shard in shards.items()
                if shard.num_samples
            ),
            unreadable=unreadable,
            frames=self.frames,
        )
        index.write(folder.path)
        return index


@torch.inference_mode()
def encode_pixels(pixels: Tensor, tokenizer: Storing, mirrored: bool) -> np.ndarray:
    """Turn pixels (B, 3, …, size, size) uint8 into what is kept of them, (B, copies, …) on the CPU.

    Raises:
        UserError: the device's memory is too small.
    """
    scaled = pixels.float() / 255
    try:
        copies = [tokenizer.store(scaled)] + ([tokenizer.store(scaled.flip(-1))] if mirrored else [])
    except torch.OutOfMemoryError as error:
        raise UserError(f"{len(pixels)} samples at once do not fit the memory: lower --batch_size") from error
    return torch.stack(copies, 1).cpu().numpy()


def check_share(unreadable: Sequence[str], num_tried: int, max_unreadable: float, thing: str) -> None:
    """Check that not too many pictures, or things of another name, are unreadable.

    Raises:
        UserError: they are; the first are named.
    """
    if len(unreadable) > max_unreadable * num_tried:
        raise UserError(
            f"{len(unreadable)} {thing}s cannot be read, more than --max_unreadable {max_unreadable:g} allows: "
            f"{', '.join(unreadable[:3])}{', …' if len(unreadable) > 3 else ''}; allow more to go on, "
            "or mend them and begin in another --output"
        )


def _without_path(value: Any) -> Any:
    """Leave out the path of a tokenizer's file: its hash identifies it, and each machine may have it elsewhere."""
    if not (isinstance(value, dict) and "sha256" in value):
        return value
    arguments = {name: argument for name, argument in value["init_args"].items() if name != "path"}
    return value | {"init_args": arguments}


def _is_short(value: Any) -> bool:
    return len(str(value)) <= 20

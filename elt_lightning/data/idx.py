"""Pictures and labels in the IDX format: MNIST, and its heirs KMNIST, EMNIST and Fashion-MNIST, gzipped or not.

The format (yann.lecun.com/exdb/mnist): two bytes of zero, the type (8 for unsigned bytes), the number of dimensions,
each one's size as a big-endian 32-bit integer, then the values, the last dimension running fastest.

EMNIST's files keep pictures column by column, and its letters count from 1; both are mended here, by the files' names.
"""

import gzip
import re
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elt_lightning.data.crops import Picture
from elt_lightning.errors import UserError
from elt_lightning.files import is_file, open_regular, written_aside

NAME = re.compile(r"(?P<set>.*?)(?P<side>train|t10k|test)-images(?P<dot>[-.])idx3-ubyte(\.gz)?")
"""Of a file of pictures."""

UNSIGNED_BYTES = 8


class IdxSet(NamedTuple):
    """The training half or the held-out half of a data set: a file of pictures, and one of labels beside it."""

    path: str  # of the pictures

    @property
    def of_emnist(self) -> bool:
        """Whether the files are EMNIST's."""
        return Path(self.path).name.startswith("emnist-")

    def images(self) -> Tensor:
        """Read the pictures (n, H, W) uint8 (UserError: they cannot be read)."""
        images = torch.from_numpy(read_idx(self.path, dimensions=3))
        return images.transpose(1, 2).contiguous() if self.of_emnist else images

    def labels(self) -> Tensor:
        """Read the labels (n,) int64, from 0 up (UserError: they cannot be read)."""
        folder, name = Path(self.path).parent, Path(self.path).name
        stem = name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
        path = existing(folder / stem)
        if path is None:
            raise UserError(f"{self.path} has no labels: neither {stem} nor {stem}.gz lies beside it")
        labels = torch.from_numpy(read_idx(str(path), dimensions=1)).long()
        if name.startswith("emnist-letters-"):
            labels -= 1
        if len(labels) and labels.min() < 0:
            raise UserError(f"{path}: the labels of EMNIST's letters begin with 1, and there is a 0")
        return labels


def find_halves(root: str) -> tuple[IdxSet, IdxSet]:
    """Find the training half and the held-out half of the data set in a folder.

    Args:
        root: the folder; or, where it holds several data sets, as EMNIST's does, the file of the training pictures.

    Raises:
        UserError: there is no data set, only one of its halves, or more than one.
    """
    folder, names = Path(root), [""]
    if is_file(root):
        folder, names = folder.parent, [Path(root).name]
    elif folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
    found = {(match["set"], match["dot"]) for match in map(NAME.fullmatch, names) if match}
    if not folder.is_dir():
        raise UserError(f"there is no {root}")
    if not found:
        raise UserError(f"{root} has no pictures of the IDX format, whose files are called train-images-idx3-ubyte.gz")
    if len(found) > 1:
        raise UserError(
            f"{root} holds several data sets, of {', '.join(sorted(name or 'no name' for name, _ in found))}: "
            "give the file of the training pictures of one as root"
        )
    ((name, dot),) = found
    halves = []
    for sides in (("train",), ("t10k", "test")):
        paths = [existing(folder / f"{name}{side}-images{dot}idx3-ubyte") for side in sides]
        path = next((path for path in paths if path is not None), None)
        if path is None:
            raise UserError(f"{folder} has no {name}{sides[0]}-images{dot}idx3-ubyte, with or without .gz")
        halves.append(IdxSet(str(path)))
    return halves[0], halves[1]


def existing(path: Path) -> Path | None:
    """Return a file as it is, or the gzipped one, or None."""
    return next((there for there in (path, path.with_name(f"{path.name}.gz")) if is_file(there)), None)


def read_idx(path: str, dimensions: int) -> np.ndarray:
    """Read a file of bytes, with as many dimensions as its values should have: uint8.

    Raises:
        UserError: the file cannot be read, is damaged or cut short, or holds something else.
    """
    try:
        with open_regular(path) as file:
            content = gzip.decompress(file.read()) if path.endswith(".gz") else file.read()
    except (OSError, EOFError, zlib.error) as error:  # gzip's own errors are an OSError and these two
        raise UserError(f"{path} cannot be read ({error}): copy or download it anew") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)) or len(content) < header:
        raise UserError(f"{path} is no IDX file of bytes in {dimensions} dimensions: it begins with {content[:4]!r}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != np.prod(shape, dtype=object):
        sizes = "×".join(map(str, shape))
        raise UserError(f"{path} holds {len(content) - header} bytes, not {sizes} as it says: copy or download it anew")
    return np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, values: Tensor) -> None:
    """Write bytes of any shape as an IDX file, gzipped where its name says so; equal values make equal files."""
    header = bytes((0, 0, UNSIGNED_BYTES, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.to(torch.uint8).numpy().tobytes()
    with written_aside(path) as aside:
        aside.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


class IdxPicture(Picture):
    """A picture of an IDX file, the ``number``-th; whoever decodes it is handed a PGM file."""

    def read(self) -> bytes:
        """Return its bytes."""
        image = _images(self.path)[self.number]
        return b"P5 %d %d 255\n" % tuple(reversed(image.shape)) + image.numpy().tobytes()


@lru_cache(maxsize=1)
def _images(path: str) -> Tensor:
    return IdxSet(path).images()  # tens of megabytes, unpacked once in each process that decodes

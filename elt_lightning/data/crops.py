"""Reading pictures: decoded, brought to one size by the ADM centre crop, by several processes at once."""

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from elt_lightning.data.workers import Loader
from elt_lightning.files import open_regular

_ENDINGS = Image.registered_extensions()  # which loads Pillow's plugins
FORMATS = tuple(
    sorted(
        set(Image.OPEN) - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"},
        key=lambda kind: (Image.OPEN[kind][1] is None, kind),  # those without a signature are tried last
    )
)
"""What a picture may be, whatever its ending: ImageNet has a PNG that is called JPEG. These are all that Pillow reads
by itself; for the others it starts programs, or knows no more than their names."""

SUFFIXES = tuple(suffix for suffix, kind in _ENDINGS.items() if kind in FORMATS)
"""Endings of pictures, in small or capital letters."""

WITHOUT_SUFFIX = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF")
"""Formats that are looked for in files without an ending: those with a signature that no text begins with."""

CROP, UPRIGHT_CROP = "adm-centre", "adm-centre-upright"
CROPS = {"stored": CROP, "upright": UPRIGHT_CROP}
"""How pictures are brought to their size, see :func:`adm_centre_crop`: as their pixels are stored, which is ImageNet's
protocol; or turned first as the camera's orientation tag says, which is how people see them."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its orientation tag (CIPA DC-008, Exif 2.32, tag 0x0112)."""

_Item = TypeVar("_Item")


class Picture(NamedTuple):
    """One picture: a stretch of a file, and what is known of it."""

    source: str  # its name below the root; below a tar file's name where it lies in one
    path: str  # the file that holds it
    offset: int = 0  # where it begins in the file, in bytes
    num_bytes: int = -1  # its length; −1 for up to the file's end
    label: int = -1  # number of its class, −1 where it was not asked for
    number: int = 0  # unique in the whole source, and the same in every run, however the work is shared

    def read(self) -> bytes:
        """Read its bytes, still compressed."""
        with open_regular(self.path) as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


def begins_as_picture(file: IO[bytes]) -> bool:
    """Look at the beginning of a file without an ending: is it of one of :data:`WITHOUT_SUFFIX`?"""
    try:
        with warnings.catch_warnings(), Image.open(file, formats=WITHOUT_SUFFIX):
            return True
    except Exception:  # Pillow's plugins may raise anything
        return False


def decode_picture(content: bytes, upright: bool = False) -> Image.Image:
    """Decode a picture's file to RGB, as ADM does (guided-diffusion/image_datasets.py).

    Grey, palette and CMYK pictures are converted, transparency becomes white, 16 bits are cut to the upper 8, an
    animation to its first frame. Pixels stay as they are stored, or are turned upright by the camera's orientation tag.

    Raises:
        Exception: whatever Pillow raises for a picture that is damaged, cut short, of another format or huge; or its
            pixels are numbers of no known range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thousands of pictures have odd metadata, which nothing here uses
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            turn = TURNS.get(image.getexif().get(0x0112, 1)) if upright else None
            return _to_rgb(image if turn is None else image.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow would clip at 0 and 255
        levels = np.asarray(image)
        if image.mode == "F" or not 0 <= levels.min() <= levels.max() < 2**16:
            raise ValueError(f"its pixels are numbers from {levels.min():g} to {levels.max():g}, of no known range")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear)
    return image.convert("RGB")


def adm_centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale and cut a picture as the ImageNet reference batches were made (ADM; DiT, SiT and MaskGIT's heirs follow).

    It is halved with a box filter while its short side is at least twice ``size``, then resized bicubically until the
    short side is ``size``, and the middle of the long side is kept: (size, size, 3) uint8.

    Raises:
        ValueError: the picture is so elongated that resizing it would fill the memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise ValueError(f"a picture of {image.width}×{image.height} is too elongated")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


class Request(NamedTuple):
    """Pictures to decode together, all of one part."""

    part: int
    pictures: Sequence[Picture]


class Crops(NamedTuple):
    """A request, done."""

    part: int  # of the request
    pictures: list[Picture]  # those that could be read, B of them, in order
    pixels: Tensor  # (B, 3, size, size) uint8
    unreadable: list[tuple[str, str]]  # the others: their ``source``, and the reason

    @property
    def num_tried(self) -> int:
        """Count the pictures of the request."""
        return len(self.pictures) + len(self.unreadable)


def crop_all(requests: Iterable[Request], size: int, num_workers: int, crop: str = CROP) -> Iterator[Crops]:
    """Decode and crop to ``size`` pixels a side, in the order of the requests; they are taken as they are needed.

    ``num_workers`` processes decode, 0 for this one; ``crop`` is :data:`CROP` or :data:`UPRIGHT_CROP`.
    """
    yield from Loader(_Cropper(size, crop == UPRIGHT_CROP), requests, num_workers, collate_fn=_unchanged)


class _Cropper(Dataset[Crops]):
    def __init__(self, size: int, upright: bool) -> None:
        self.size, self.upright = size, upright

    def __getitem__(self, request: Request) -> Crops:
        crops = np.empty((len(request.pictures), self.size, self.size, 3), np.uint8)
        pictures: list[Picture] = []
        unreadable: list[tuple[str, str]] = []
        for picture in request.pictures:
            try:
                crops[len(pictures)] = adm_centre_crop(decode_picture(picture.read(), self.upright), self.size)
                pictures.append(picture)
            except UnidentifiedImageError:  # its message is the address of the bytes in memory
                unreadable.append((picture.source, "not a picture that Pillow reads"))
            except Exception as error:  # Pillow's plugins may raise anything on a damaged file
                unreadable.append((picture.source, f"{type(error).__name__}: {error}"))
        pixels = torch.from_numpy(crops[: len(pictures)]).permute(0, 3, 1, 2).contiguous()
        return Crops(request.part, pictures, pixels, unreadable)


def _unchanged(crops: Any) -> Any:
    return crops


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Cut a row into lists of ``size``; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def default_workers() -> int:
    """Return one process for each CPU core that this one may use, and at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)

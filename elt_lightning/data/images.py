"""Where pictures come from: folders and tar files, and which class each picture is of.

A source is cut into parts that never change, each of which becomes one shard: so several processes can share the work
without talking to each other, and what a killed one had finished stays finished. Nothing is extracted or unpickled.
"""

import filecmp
import hashlib
import logging
import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor
from webdataset.shardlists import expand_urls

from elt_lightning.data.crops import (
    CROP,
    CROPS,
    SUFFIXES,
    Picture,
    Request,
    begins_as_picture,
    chunks,
    crop_all,
    default_workers,
)
from elt_lightning.data.idx import NAME, IdxPicture, IdxSet
from elt_lightning.data.image_labels import read_labels
from elt_lightning.errors import UserError
from elt_lightning.files import counted_by_suffix, open_regular, parse_json, sha256

logger = logging.getLogger(__name__)

MOST_PADDING = 2**20
"""Bytes of zeros that may end a tar; programs fill up to a multiple of 10 KiB, or of what they were told."""

MOST_CLASSES = 1_000_000
"""A higher class number in a tar is taken for a mistake."""


class ImageSource(ABC):
    """Labelled pictures, cut into parts.

    Attributes:
        classes: names of the classes in the order of their numbers; None where only the labels will tell how many
            there are, and a class has no other name than its number.
        num_parts: how many parts there are.
        description: in plain data what decides the parts: two sources that say the same have the same ones.
    """

    classes: tuple[str, ...] | None
    num_parts: int
    description: dict[str, Any]

    @abstractmethod
    def part(self, number: int) -> list[Picture]:
        """List the pictures of a part, always the same ones in the same order.

        Raises:
            UserError: the part is damaged, or a label is missing or wrong.
        """

    @abstractmethod
    def count(self, number: int) -> int | None:
        """Count the pictures of a part, or None where that would mean reading it."""


class ListedSource(ImageSource):
    """Pictures that are listed beforehand, cut into parts of ``samples_per_shard``; a picture's number is its place."""

    def __init__(self, num_pictures: int, samples_per_shard: int) -> None:
        self.num_pictures, self.samples_per_shard = num_pictures, samples_per_shard
        self.num_parts = -(-num_pictures // samples_per_shard)

    @abstractmethod
    def picture(self, place: int) -> Picture:
        """Return the picture at a place of the list."""

    def part(self, number: int) -> list[Picture]:  # noqa: D102
        first = number * self.samples_per_shard
        return [self.picture(place) for place in range(first, first + self.count(number))]

    def count(self, number: int) -> int:  # noqa: D102
        return min(self.samples_per_shard, self.num_pictures - number * self.samples_per_shard)


def open_source(
    roots: Sequence[str],
    labels: str | None = None,
    classes: Sequence[str] | None = None,
    samples_per_shard: int = 10_000,
    seed: int = 0,
) -> ImageSource:
    """Open a folder of pictures, tar files of pictures, or a file of pictures in the IDX format.

    Args:
        roots: one folder of pictures; or WebDataset tars: their folder, or names of tars, which may have braces such
            as ``train-{000..127}.tar``; or a file called as MNIST's are, ``train-images-idx3-ubyte.gz``.
        labels: file that says the class of each picture of a folder, see :func:`read_labels`; None where each class has
            a folder of its own.
        classes: all class names in their order, for pictures that may not show every class; None to take what there is.
        samples_per_shard: pictures of a part. A tar is always one part.
        seed: of the order of a folder's pictures.

    Raises:
        UserError: there is nothing there, or pictures and labels do not go together.
    """
    if is_idx(roots):
        if labels is not None:
            raise UserError(f"--labels is for folders of pictures: {roots[0]} has its labels in a file beside it")
        return IdxSource(roots[0], classes, samples_per_shard)
    tars = find_tars(roots, report_others=True)
    if not tars:
        return FolderSource(roots[0], labels, classes, samples_per_shard, seed)
    if labels is not None:
        raise UserError(f"--labels is for folders of pictures: {tars[0]} and the like hold their labels themselves")
    return TarSource(tars, classes)


class FolderSource(ListedSource):
    """A folder of pictures, with a folder for each class or a file of labels.

    Files of one class lie side by side, so shards cut from the list as it is would hold few classes each, and training,
    which reads few shards at a time, would see batches of few classes. So the list is shuffled first.

    The arguments are those of :func:`open_source`.
    """

    def __init__(
        self, root: str, labels: str | None, classes: Sequence[str] | None, samples_per_shard: int, seed: int
    ) -> None:
        listing, others = list_pictures(root)
        name_others(root, others)
        super().__init__(len(listing), samples_per_shard)
        names = [name for name, _ in listing]
        if labels is None:
            class_names = _class_folders(root, names, None if classes is not None else others)
        else:
            class_names = read_labels(labels, names)
        self.classes = _in_order(set(class_names)) if classes is None else tuple(classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        for name, class_name in zip(names, class_names, strict=True):
            if class_name not in numbers:
                raise UserError(f"{root}/{name} is of class {class_name!r}, which the list of --classes_from lacks")
        # A hash of each name, in place of a generator's shuffle: the order is the same on every machine and version.
        places = sorted(
            range(len(names)), key=lambda place: hashlib.sha256(os.fsencode(f"{seed}\0{names[place]}")).digest()
        )
        self.root = root
        self._pictures = [(names[place], numbers[class_names[place]]) for place in places]
        self.description = {
            "pictures": _hash(listing),
            "labels": None if labels is None else sha256(labels),
            "samples_per_shard": samples_per_shard,
            "seed": seed,
        }

    def picture(self, place: int) -> Picture:  # noqa: D102
        name, label = self._pictures[place]
        return Picture(name, os.path.join(self.root, name), label=label, number=place)


class TarSource(ImageSource):
    """WebDataset tars of pictures: ``x.jpg`` (or another suffix of pictures) with ``x.cls`` or ``x.json`` beside it.

    ``.cls`` holds the class number; ``.json`` holds it under ``"label"``, or a name that ``classes`` has. A tar is one
    part, and is opened only when its turn comes.

    Args:
        tars: the files.
        classes: as for :func:`open_source`.

    Raises:
        UserError: two have the same name or content, one is cut short, or all together are too large to number their
            pictures.
    """

    def __init__(self, tars: Sequence[str], classes: Sequence[str] | None) -> None:
        listing = [(Path(tar).name, os.path.getsize(tar)) for tar in tars]
        twice = [name for name, count in Counter(name for name, _ in listing).items() if count > 1]
        if twice:
            raise UserError(f"two tars are called {twice[0]}: samples could not be told apart by their source")
        refuse_copies(tars)
        for tar in tars:
            check_end(tar)  # now, before hours of work: a whole tar would not be the file that the work began with
        # No two pictures begin in the same KiB, as a header and a content take half of one each at least: where a
        # picture begins, in KiB from the start of the first tar, numbers it without reading the tars before it.
        self._begins = list(accumulate((size for _, size in listing), initial=0))
        if self._begins[-1] > 1024 * 2**32:
            raise UserError("the tars have more than 4 TiB together: encode them in several runs")
        self.tars, self.num_parts = list(tars), len(tars)
        self.classes = None if classes is None else tuple(classes)
        self._numbers = {name: number for number, name in enumerate(self.classes or ())}
        self.description = {"pictures": _hash(listing)}

    def part(self, number: int) -> list[Picture]:
        """Read the headers and labels of one tar; a picture's number tells where it begins, in KiB over all tars."""
        tar = self.tars[number]
        pictures, labels, others = read_tar(tar)
        name_others(tar, others)
        found = []
        for key, picture in pictures.items():
            if key not in labels:
                raise UserError(f"{picture.source} has no label: neither a .cls nor a .json with one lies beside it")
            place = (self._begins[number] + picture.number) // 1024
            found.append(picture._replace(label=self._class_number(labels[key], picture.source), number=place))
        return found

    def _class_number(self, label: int | str, source: str) -> int:
        if isinstance(label, str) and self.classes is None:
            raise UserError(f"the label of {source} is a name, {label!r}: --classes_from says which number it has")
        number = self._numbers.get(label, -1) if isinstance(label, str) else label
        if not 0 <= number < (MOST_CLASSES if self.classes is None else len(self.classes)):
            where = "a class number" if self.classes is None else "a class of --classes_from"
            raise UserError(f"the label of {source} is {label!r}, which is not {where}")
        return number

    def count(self, number: int) -> None:  # noqa: D102
        return None


class IdxSource(ListedSource):
    """A file of pictures in the IDX format, in its own order: those of MNIST and its heirs are shuffled already.

    Args:
        path: of the pictures; their labels lie beside it.
        classes: as for :func:`open_source`; without them a class is called by its number.
        samples_per_shard: pictures of a part.
    """

    def __init__(self, path: str, classes: Sequence[str] | None, samples_per_shard: int) -> None:
        labels = IdxSet(path).labels()
        super().__init__(len(labels), samples_per_shard)
        self.path, self._name = path, Path(path).name
        self._labels: list[int] = labels.tolist()
        if (count := len(IdxSet(path).images())) != len(labels):
            raise UserError(f"{path} has {count} pictures and {len(labels)} labels")
        highest = max(self._labels, default=-1)
        self.classes = tuple(map(str, range(highest + 1))) if classes is None else tuple(classes)
        if highest >= len(self.classes):
            raise UserError(f"{path} has pictures of class {highest}, which the list of --classes_from lacks")
        self.description = {
            "pictures": sha256(path),
            "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
            "samples_per_shard": samples_per_shard,
        }

    def picture(self, place: int) -> Picture:  # noqa: D102
        return IdxPicture(f"{self._name}/{place}", self.path, label=self._labels[place], number=place)


def is_idx(roots: Sequence[str]) -> bool:
    """Return whether the one root is a file that is called as pictures in the IDX format are."""
    return len(roots) == 1 and NAME.fullmatch(Path(roots[0]).name) is not None and os.path.isfile(roots[0])


def _in_order(classes: set[str]) -> tuple[str, ...]:
    """Sort class names, as numbers where all are."""
    if all(name.isdecimal() for name in classes):
        return tuple(sorted(classes, key=lambda name: (int(name), name)))
    return tuple(sorted(classes))


def _class_folders(root: str, names: Sequence[str], others: Sequence[str] | None) -> list[str]:
    """Return each picture's class: the first folder on its way from the root.

    Folders without pictures are refused, and what of ``others`` lies in them is named, unless that is None.
    """
    for name in names:
        if "/" not in name:
            raise UserError(f"{root}/{name} lies in no class folder: move it, or give a file of labels with --labels")
    classes = [name.partition("/")[0] for name in names]
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")}
    empty = sorted(folders - set(classes))
    if empty and others is not None:
        inside = [name for name in others if name.startswith(f"{empty[0]}/")]
        only = f", only {counted_by_suffix(inside)}" if inside else ""
        raise UserError(
            f"the class folder {root}/{empty[0]} has no pictures{only}: remove it, or take the classes with "
            "--classes_from"
        )
    return classes


def name_others(where: str, others: Sequence[str], wanted: str = "pictures") -> None:
    """Count in the log what is left out of a folder or a tar, by suffix."""
    if others:
        logger.warning("left out of %s, as no %s: %s", where, wanted, counted_by_suffix(others))


class Listing(NamedTuple):
    """What lies below a folder."""

    pictures: list[tuple[str, int]]  # (name below it, bytes) of each, sorted by name
    others: list[str]  # names of all other files


def list_pictures(root: str) -> Listing:
    """Find the pictures below a folder, links followed: by their suffix, or without one by how they begin.

    Hidden files and folders are left out, and so are the ``._x`` that macOS puts beside a file x.

    Raises:
        UserError: the folder is missing or cannot be read, links lead round in it, or it has no pictures.
    """
    listing = Listing([], [])
    try:
        _walk(root, "", (), listing)
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read: {error.strerror} ({error.filename})") from error
    listing.pictures.sort()
    listing.others.sort()
    if not listing.pictures:
        only = f", only {counted_by_suffix(listing.others)}" if listing.others else ""
        raise UserError(f"{root} has no pictures{only}, and it is no folder of .tar files alone")
    return listing


def _walk(folder: str, below: str, above: tuple[tuple[int, int], ...], listing: Listing) -> None:
    found = os.stat(folder)
    if (found.st_dev, found.st_ino) in above:
        raise UserError(f"{folder} is a link to a folder that it lies in: remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                _walk(entry.path, f"{below}{entry.name}/", (*above, (found.st_dev, found.st_ino)), listing)
            elif _is_picture(entry):
                # A dangling link has no size; it is listed all the same, to be named as unreadable.
                size = entry.stat().st_size if os.path.exists(entry.path) else -1
                listing.pictures.append((below + entry.name, size))
            else:
                listing.others.append(below + entry.name)


def _is_picture(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix:
        return suffix in SUFFIXES
    try:
        with open_regular(entry.path) as file:
            return begins_as_picture(file)
    except OSError:
        return False


def find_tars(roots: Sequence[str], report_others: bool = False) -> list[str]:
    """Find the tars meant by a folder that has nothing else, or by names, in the order given.

    Nothing is returned where ``roots`` is one folder of another kind. With ``report_others`` the log counts which files
    of a folder of tars are left out.

    Raises:
        UserError: a tar does not exist, or folders and tars are mixed.
    """
    if len(roots) == 1 and os.path.isdir(roots[0]):
        try:
            paths = sorted(os.path.join(roots[0], name) for name in os.listdir(roots[0]) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"the folder {roots[0]} cannot be read: {error.strerror}") from error
        tars = [path for path in paths if path.lower().endswith(".tar")]
        others = [path for path in paths if path not in tars]
        if not tars or any(os.path.isdir(path) or path.lower().endswith(SUFFIXES) for path in others):
            return []
        if report_others:
            name_others(roots[0], others, "tars")
        return tars
    try:
        tars = [path for root in roots for path in ([root] if os.path.exists(root) else expand_urls(root))]
    except ValueError as error:
        raise UserError(f"{' '.join(roots)} is no list of tars: {error}") from error
    for path in tars:
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist")
        if not os.path.isfile(path):
            raise UserError(f"{path} is no tar file: give one folder, or tar files alone")
    return tars


def refuse_copies(tars: Sequence[str]) -> None:
    """Refuse a tar that is a copy of another: its pictures would count twice.

    Raises:
        UserError: there is one, or a tar cannot be read.
    """
    alike: dict[tuple[int, bytes], str] = {}
    for tar in tars:
        try:
            with open_regular(tar) as file:
                beginning = file.read(2**16)
            other = alike.setdefault((os.path.getsize(tar), hashlib.sha256(beginning).digest()), tar)
            if other != tar and any(beginning) and filecmp.cmp(other, tar, shallow=False):
                raise UserError(f"{tar} is a copy of {other}: its pictures would count twice, remove it")
        except OSError as error:
            raise UserError(f"{tar} cannot be read: {error.strerror}") from error


def read_tar(path: str) -> tuple[dict[str, Picture], dict[str, int | str], list[str]]:
    """List a tar's pictures and read its labels; a sample's key is its members' name up to the first dot.

    Returns:
        the first picture of each key, with the header's place in bytes as its number; the labels by key; and the names
        of the members that are neither.

    Raises:
        UserError: the file is compressed, damaged or cut short, or a label cannot be read.
    """
    pictures: dict[str, Picture] = {}
    labels: dict[str, int | str] = {}
    others: list[str] = []
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, dot, ending = name.name.partition(".")
                key, ending = str(name.with_name(stem)) if stem else "", dot + ending.lower()
                if member.isdir() or not key:
                    continue
                content = tar.extractfile(member) if member.isfile() else None
                if content is None:
                    others.append(member.name)
                elif key not in pictures and (ending in SUFFIXES or (not ending and begins_as_picture(content))):
                    source = f"{Path(path).name}/{member.name}"
                    picture = Picture(source, path, member.offset_data, member.size, number=member.offset)
                    pictures[key] = picture
                elif ending in (".cls", ".json"):
                    label = _parsed_label(content.read(), ending, f"{path}/{member.name}")
                    if label is not None and (ending == ".cls" or key not in labels):
                        labels[key] = label
                else:
                    others.append(member.name)
            # The library takes a damaged header for the end, and a hole that a download left. Behind a true end come
            # zeros alone, and few of them.
            file.seek(tar.offset)
            rest = file.read(MOST_PADDING + 1)
            if not tarfile.BLOCKSIZE <= len(rest) <= MOST_PADDING or any(rest):
                raise tarfile.ReadError(f"at byte {tar.offset} there is neither a header nor the end")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is compressed, damaged or cut short: {error}") from error
    return pictures, labels, others


def check_end(path: str) -> None:
    """Check that a file ends as a tar does, with a block of zeros, which one that was cut short does not.

    Raises:
        UserError: it does not.
    """
    block = tarfile.BLOCKSIZE
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - block, 0))
            is_whole = size % block == 0 and file.read() == bytes(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not is_whole:
        raise UserError(f"{path} is compressed, damaged or cut short: tar files end in zeros")


def _parsed_label(content: bytes, ending: str, source: str) -> int | str | None:
    try:
        if ending == ".cls":
            return int(content)
        parsed = parse_json(content)
    except ValueError as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    label = parsed.get("label") if isinstance(parsed, dict) else None
    if label is not None and type(label) not in (int, str):
        raise UserError(f"the label of {source} is neither a number nor a name: {label!r}")
    return label


def batches(root: str, size: int, batch_size: int, workers: int | None = None, crop: str = CROP) -> Iterator[Tensor]:
    """Read all pictures of a folder of any layout, or of tars, in the order of their names; no labels are needed.

    They come as (B, 3, size, size) uint8, B from 1 to ``batch_size``. What cannot be read is left out, named in the
    log, and counted there at the end. ``workers`` processes decode, None for one per core; ``root`` is as for
    :func:`open_source`, ``crop`` as for :func:`~elt_lightning.data.crops.crop_all`.

    Raises:
        UserError: there is no such folder, tar or crop, or not one picture can be read.
    """
    if crop not in CROPS.values():
        raise UserError(f"pictures are brought to their size by {' or '.join(CROPS.values())}, not by {crop!r}")
    num_read = num_unreadable = 0
    requests = (Request(0, chunk) for chunk in chunks(_all_pictures(root), batch_size))
    for crops in crop_all(requests, size, default_workers() if workers is None else workers, crop):
        for name, reason in crops.unreadable:
            logger.warning("%s cannot be read and is left out: %s", name, reason)
        num_read += len(crops.pictures)
        num_unreadable += len(crops.unreadable)
        if crops.pictures:
            yield crops.pixels
    if not num_read:
        raise UserError(f"none of the {num_unreadable} pictures of {root} can be read")
    if num_unreadable:
        logger.warning("%d of %d pictures of %s were left out", num_unreadable, num_read + num_unreadable, root)


def _all_pictures(root: str) -> Iterator[Picture]:
    if is_idx([root]):
        count, name = len(IdxSet(root).images()), Path(root).name
        yield from (IdxPicture(f"{name}/{number}", root, number=number) for number in range(count))
        return
    tars = find_tars([root], report_others=True)
    for tar in tars:
        pictures, _, others = read_tar(tar)
        name_others(tar, others)
        yield from pictures.values()
    if not tars:
        listing, others = list_pictures(root)
        name_others(root, others)
        for name, _ in listing:
            yield Picture(name, os.path.join(root, name))


def fingerprint(root: str) -> str:
    """Hash the names and sizes, not the contents, of a folder's pictures or of tars: 64 hexadecimal digits.

    Raises:
        UserError: there is no such folder or tar, or no picture in it.
    """
    tars = find_tars([root])
    return _hash([(Path(tar).name, os.path.getsize(tar)) for tar in tars] if tars else list_pictures(root).pictures)


def _hash(listing: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for name, size in listing:
        digest.update(os.fsencode(f"{name}\0{size}\n"))
    return digest.hexdigest()

"""Writing files so that a reader never meets half of one, and reading files that may be anything."""

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePath
from statistics import mean, stdev
from typing import Any


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Return a temporary path beside ``path``; what was written there takes the name ``path`` when the block succeeds.

    A crash leaves ``path`` as it was. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(folder: str | Path) -> Iterator[Path]:
    """Return a temporary folder in ``folder``; the files written there move into ``folder`` when the block succeeds."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".aside.") as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            publish(file, Path(folder) / file.name)


def publish(aside: Path, path: Path) -> None:
    """Name a file, and let everyone read it: temporary ones are readable to their owner alone."""
    with suppress(PermissionError):  # file systems without such rights
        os.chmod(aside, 0o644)
    os.replace(aside, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8 whatever the locale; it appears whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, "utf-8")


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write plain data as JSON, in the same way."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def check_regular(path: str | Path) -> None:
    """Refuse what only looks like a file: a FIFO would be waited for without end, and a device read without end.

    Raises:
        OSError: the path is missing, or is neither a file nor a folder.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a FIFO, a socket or a device, not a file", str(path))


def is_file(path: str | Path) -> bool:
    """Return whether there is a file, or a link to one.

    Raises:
        OSError: what is there is neither a file nor a folder; see :func:`check_regular`.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        check_regular(path)
    return Path(path).is_file()


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes (OSError: it cannot be opened, or is none; see :func:`check_regular`)."""
    check_regular(path)
    return open(path, "rb")


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file that are not blank, stripped; byte-order marks and Windows' line ends are not kept.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_regular(path) as file:
        lines = file.read().decode("utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def counted_by_suffix(names: Iterable[str], most: int = 8) -> str:
    """Count files by what their names end in, the frequent ones first: "12 .txt, 3 .heic, 1 without a suffix"."""
    counts = Counter(PurePath(name).suffix.lower() or "without a suffix" for name in names)
    shown = [f"{count} {suffix}" for suffix, count in counts.most_common(most)]
    return ", ".join(shown + [f"{len(counts) - most} more suffixes"] * (len(counts) > most))


def parse_json(content: str | bytes) -> Any:
    """Parse JSON from outside (ValueError: it is not JSON, for whatever reason)."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested without end") from error


def whole_number(value: Any) -> int:
    """Return a value from outside that must be a whole number; ``int`` would cut fractions and read words.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def sha256(path: str | Path) -> str:
    """Hash a file's content: 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def next_numbered(folder: str | Path, stem: str) -> Path:
    """Return ``folder/stem_N`` with the smallest N from 0 up that is above all that exist, whatever their suffix."""
    endings = [path.stem.removeprefix(f"{stem}_") for path in Path(folder).glob(f"{stem}_*")]
    taken = [int(ending) for ending in endings if ending.isdecimal()]
    return Path(folder) / f"{stem}_{max(taken, default=-1) + 1}"


def claim_numbered(folder: str | Path, stem: str) -> Path:
    """Make the folder :func:`next_numbered` gives; of several processes that ask at once each gets its own."""
    while True:
        path = next_numbered(folder, stem)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as Markdown, without a newline at its end."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]])


def with_deviation(values: Sequence[float], form: str = ".1f") -> str:
    """Write mean and sample standard deviation, which a single value has not."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"

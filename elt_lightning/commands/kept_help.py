"""Help of the trainer's commands, kept after it was first made: to make it is to import Lightning, for seconds."""

import importlib
import importlib.metadata
import io
import os
import shutil
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import elt_lightning
from elt_lightning.files import write_text

SHOWN = ("torch", "lightning", "jsonargparse")
"""Packages whose classes and layout the help shows."""


def run(name: str, module: str) -> None:
    """Print the help of a command, which ``module`` makes where none is kept or something has changed since."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept, key = home / "elt_lightning" / f"{name}_help.txt", made_of()
    with suppress(OSError, UnicodeDecodeError):
        found, _, text = kept.read_text("utf-8").partition("\n")
        if found == key:
            print(text, end="")
            return
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        importlib.import_module(module).run(name, ["--help"])
    print(printed.getvalue(), end="")
    with suppress(OSError):  # a home that is full or may not be written to: it is made again next time
        write_text(kept, f"{key}\n{printed.getvalue()}")


def made_of() -> str:
    """Return what the text depends on, as one line: versions, this package's files, the terminal's width."""
    files = [path.stat() for path in Path(elt_lightning.__file__).parent.rglob("*.py")]
    changed = (len(files), sum(file.st_size for file in files), max(file.st_mtime_ns for file in files))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in SHOWN]
    return f"{sys.version_info[:3]} {versions} {elt_lightning.__file__} {changed} {shutil.get_terminal_size().columns}"

"""What an AVI file says of itself, to tell a whole one from one that was cut short or damaged.

Decoders read what they find and do not report what is missing. Layout: "AVI RIFF File Reference", Microsoft.
"""

import os
import struct
from pathlib import Path

from elt_lightning.files import open_regular

INDEX_ENTRY = struct.Struct("<2s2sIII")
"""Of ``idx1``: number and kind of the stream, flags, offset and bytes of the chunk."""

VIDEO_KINDS = (b"dc", b"db")


class BrokenClipError(Exception):
    """A video file cannot be read, or not the frames asked for; the message tells why, without its name."""


def indexed_frames(path: str | Path) -> int | None:
    """Count the frames that an AVI's index lists; None where the file is no AVI, or has no index.

    Empty chunks, which stand for frames left out, are not counted.

    Raises:
        BrokenClipError: the file ends before the chunks that it announces, or is missing.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            riff, _, form = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
            if (riff, form) != (b"RIFF", b"AVI "):
                return None
            while len(header := file.read(8)) == 8:
                name, length = struct.unpack("<4sI", header)
                if file.tell() + length > size:
                    raise BrokenClipError(f"cut short: {size} bytes of {file.tell() + length} are there")
                if name == b"idx1":
                    return _count(file.read(length))
                file.seek(length + length % 2, os.SEEK_CUR)
    except OSError as error:
        raise BrokenClipError(error.strerror or str(error)) from error
    return None


def _count(index: bytes) -> int:
    """Count the chunks of the first video stream that are not empty."""
    entries = INDEX_ENTRY.iter_unpack(index[: len(index) // INDEX_ENTRY.size * INDEX_ENTRY.size])
    streams = [stream for stream, kind, _, _, length in entries if kind in VIDEO_KINDS and length]
    return streams.count(min(streams, default=b"00"))

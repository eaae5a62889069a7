"""Reading and writing clips: the one place that knows decoders.

Frames returned are the frames asked for. decord's random access silently returns others where a clip has B-frames, as
thousands of UCF-101's have; so clips are read in order from their first frame, whatever the decoder, and a frame's
number is its place in that order. A reader lives as long as one call and has one thread: readers that outlive a fork
make loader processes hang, and processes are many already.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elt_lightning.data.avi import BrokenClipError, indexed_frames
from elt_lightning.errors import UserError
from elt_lightning.files import check_regular, written_aside

__all__ = ["BrokenClipError", "default_decoder", "num_frames", "read_clip", "write_clip"]

Decoder = Literal["decord", "av"]


class _Reading(NamedTuple):
    """How a decoder is asked: for the number of coded frames of a file, and for some frames (H, W, 3) uint8 of it."""

    count: Callable[[str], int]
    frames: Callable[[str, range], list[np.ndarray]]


def default_decoder() -> Decoder:
    """Return decord where it is installed, and PyAV elsewhere (UserError: neither is installed)."""
    if importlib.util.find_spec("decord"):
        return "decord"
    if importlib.util.find_spec("av"):
        return "av"
    raise UserError("reading clips needs decord or PyAV: pip install decord, or pip install 'elt-lightning[video]'")


def num_frames(path: str | Path, decoder: Decoder | None = None) -> int:
    """Count the frames of a clip, without decoding it; None for the decoder is :func:`default_decoder`.

    Raises:
        BrokenClipError: the file cannot be read, or has fewer frames than its index lists.
    """
    indexed = indexed_frames(path)
    found = _DECODERS[decoder or default_decoder()].count(str(path))
    if found < (indexed or 0):
        raise BrokenClipError(f"damaged: {found} of {indexed} frames are found")
    if not found:
        raise BrokenClipError("it has no frames")
    return found


def read_clip(path: str | Path, first: int, count: int, stride: int = 1, decoder: Decoder | None = None) -> Tensor:
    """Read frames ``first``, ``first + stride``, …, ``count`` of them, and none beyond: (F, H, W, 3) uint8, RGB.

    Of a frame with damaged data, decoders return what they can make out. Without a decoder :func:`default_decoder`.

    Raises:
        BrokenClipError: the file cannot be read, or has not all these frames.
    """
    if first < 0 or count < 1 or stride < 1:
        raise ValueError(f"first must be at least 0, count and stride at least 1, not {first}, {count}, {stride}")
    try:
        check_regular(path)
    except OSError as error:
        raise BrokenClipError(error.strerror) from error
    wanted = range(first, first + (count - 1) * stride + 1, stride)
    frames = _DECODERS[decoder or default_decoder()].frames(str(path), wanted)
    if len(frames) < count:
        raise BrokenClipError(f"it ends before frame {wanted[len(frames)]}")
    return torch.from_numpy(np.stack(frames))


def _open_with_decord(path: str) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # it would print a line for each frame that is packed with another
    return decord.VideoReader(path, num_threads=1)


def _count_with_decord(path: str) -> int:
    try:
        return len(_open_with_decord(path))
    except Exception as error:  # RuntimeError, or an exception of decord's own
        raise BrokenClipError(_reason(error)) from error


def _frames_with_decord(path: str, wanted: range) -> list[np.ndarray]:
    frames: list[np.ndarray] = []
    try:
        reader = _open_with_decord(path)
        # Neither seek nor skip_frames: both lead to other frames where there are B-frames.
        for number in range(min(wanted[-1] + 1, len(reader))):
            frame = reader.next()
            if number in wanted:
                frames.append(_without_padding(frame.asnumpy()))
    except StopIteration:
        pass
    except Exception as error:
        raise BrokenClipError(_reason(error)) from error
    return frames


def _without_padding(frame: np.ndarray) -> np.ndarray:
    """Undo what decord does to narrow frames: rows are padded, and it takes the padding for further channels."""
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _count_with_av(path: str) -> int:
    import av

    try:
        with av.open(path) as container:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    except (av.FFmpegError, IndexError) as error:
        raise BrokenClipError(_reason(error)) from error


def _frames_with_av(path: str, wanted: range) -> list[np.ndarray]:
    import av

    def in_order(container: Any) -> Iterator[Any]:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        yield from container.decode(stream)

    try:
        with av.open(path) as container:
            numbered = zip(range(wanted[-1] + 1), in_order(container), strict=False)
            return [frame.to_ndarray(format="rgb24") for number, frame in numbered if number in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise BrokenClipError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


_DECODERS = {
    "decord": _Reading(_count_with_decord, _frames_with_decord),
    "av": _Reading(_count_with_av, _frames_with_av),
}


def write_clip(
    path: str | Path, frames: Tensor, fps: int = 25, codec: Literal["mpeg4", "h264"] = "mpeg4", b_frames: int = 0
) -> None:
    """Write a clip through PyAV; the file appears whole or not at all.

    Args:
        path: its ending says which container: .avi, .mp4, …
        frames: (F, H, W, 3) uint8; H and W even, for colours are kept at half the size.
        fps: frames per second.
        codec: MPEG-4 part 2, whose FourCC is XVID in an AVI as in UCF-101; or H.264.
        b_frames: how many frames in a row may be predicted from both sides.

    Raises:
        UserError: PyAV is not installed.
    """
    try:
        import av
        from av.codec.context import Flags
    except ImportError as error:
        raise UserError("writing clips needs PyAV: pip install 'elt-lightning[video]'") from error
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {tuple(frames.shape)} {frames.dtype}")
    _, height, width, _ = frames.shape
    with written_aside(path) as aside, av.open(str(aside), "w") as container:
        options = {"crf": "16", "threads": "1"} if codec == "h264" else {"qmin": "2", "qmax": "2", "threads": "1"}
        stream = container.add_stream("libx264" if codec == "h264" else codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.flags |= Flags.bitexact
        if codec == "mpeg4" and Path(path).suffix == ".avi":
            stream.codec_context.codec_tag = "XVID"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))

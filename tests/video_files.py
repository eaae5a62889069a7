"""Writes small videos whose frames say which they are, and folders of them laid out like UCF-101."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.codec.context import Flags
from torch import Tensor

from elt_lightning.data.decoding import write_clip

BLOCK = 8
"""Side in pixels of a block that stands for one bit, dark or bright: large enough to survive compression."""

SIDE = 64

CLASSES = ("ApplyLipstick", "Biking", "HandstandPushups")


def numbered_frames(count: int, video: int = 0, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Draw frames (F, H, W, 3) uint8: two rows of blocks hold each frame's number and the video's; the rest moves."""
    random = np.random.default_rng(video)
    texture = random.integers(60, 200, (height // BLOCK, width // BLOCK, 3), dtype=np.uint8)
    texture = texture.repeat(BLOCK, 0).repeat(BLOCK, 1)
    frames = np.stack([np.roll(texture, (3 * number, 2 * number), (0, 1)) for number in range(count)])
    for number in range(count):
        for row, value in enumerate((number, video)):
            for bit in range(8):
                block = (slice(row * BLOCK, (row + 1) * BLOCK), slice(bit * BLOCK, (bit + 1) * BLOCK))
                frames[number][block] = 235 if value >> bit & 1 else 16
    return torch.from_numpy(frames)


def read_number(frame: Tensor, row: int = 0) -> int:
    """Read the number of a frame (H, W, 3) uint8, or the video's from the second row."""
    bits = frame[row * BLOCK : (row + 1) * BLOCK, : 8 * BLOCK].float().mean(2).unflatten(1, (8, BLOCK)).mean((0, 2))
    return sum(1 << bit for bit, bright in enumerate((bits > 128).tolist()) if bright)


def numbers_of(clip: Tensor) -> list[int]:
    """Read the numbers of a clip's frames (3, F, H, W)."""
    return [read_number(frame) for frame in clip.permute(1, 2, 3, 0)]


def video_of(clip: Tensor) -> int:
    """Read which video a clip (3, F, H, W) is of."""
    (video,) = {read_number(frame, row=1) for frame in clip.permute(1, 2, 3, 0)}
    return video


def write_packed_avi(path: Path, frames: Tensor, b_frames: int) -> list[int]:
    """Write MPEG-4 as XviD does for AVI: a B-frame lies in the chunk of the frame before it, and leaves a gap behind.

    A chunk holds one frame of display time. To show a B-frame one needs the later frame it is predicted from, so that
    comes in the same chunk; where its own turn would be, a frame "not coded" fills the chunk.

    Returns:
        how many frames each chunk holds.
    """
    coded = _encode_mpeg4(path, frames, b_frames)
    head, picture = coded[0].split(b"\0\0\1\xb6", 1)
    coded[0] = head + b"\0\0\1\xb2DivX503b1393p\0\0\1\xb6" + picture  # the mark of packed streams
    chunks: list[bytes] = []
    while coded:
        first, *following = coded
        run = next((place for place, frame in enumerate(following) if _kind(frame) != "B"), len(following))
        behind = [*following[1:run], _not_coded(len(chunks) + run)] if run else []
        chunks += [first + b"".join(following[: min(run, 1)]), *behind]
        coded = following[run:]
    with av.open(str(path), "w") as container:
        stream = _mpeg4_stream(container, frames)
        container.start_encoding()
        for number, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 25), number, number
            packet.is_keyframe = _kind(chunk) == "I"
            container.mux(packet)
    return [chunk.count(b"\0\0\1\xb6") for chunk in chunks]


def _mpeg4_stream(container: Any, frames: Tensor) -> Any:
    stream = container.add_stream("mpeg4", rate=25, options={"qmin": "2", "qmax": "2"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.codec_tag = "XVID"
    stream.codec_context.flags |= Flags.bitexact
    return stream


def _encode_mpeg4(path: Path, frames: Tensor, b_frames: int) -> list[bytes]:
    """Encode frames, in the order that a decoder needs them in."""
    with av.open(str(path), "w") as container:
        stream = _mpeg4_stream(container, frames)
        stream.codec_context.max_b_frames = b_frames
        pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames.numpy()]
        return [bytes(packet) for picture in [*pictures, None] for packet in stream.encode(picture) if packet.size]


def _kind(frame: bytes) -> str:
    return "IPBS"[frame[frame.index(b"\0\0\1\xb6") + 4] >> 6]


def _not_coded(time: int) -> bytes:
    """A P-frame of the given time, in 25ths of a second, that says that it has no content."""
    bits = f"01{'0'}1{time % 25:05b}1{'0'}{'01111'}"
    return b"\0\0\1\xb6" + int(bits, 2).to_bytes(2, "big")


def write_ucf101(folder: Path, lengths: list[int] | None = None, side: int = SIDE) -> tuple[Path, Path]:
    """Write videos of three classes laid out like UCF-101, with lists of split 1; every third is held out.

    Video i has ``lengths[i]`` frames, bears the number i, and is of class i mod 3.

    Returns:
        the root and the folder of the lists.
    """
    lengths = lengths or [20 + 3 * number for number in range(12)]
    root, lists = folder / "UCF-101", folder / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    training, val = [], []
    for number, length in enumerate(lengths):
        name = video_name(number)
        write_clip(root / name, numbered_frames(length, number, side, side), b_frames=number % 3)
        label = CLASSES.index(name.partition("/")[0])
        (val if number % 3 == 2 else training).append(name if number % 3 == 2 else f"{name} {label + 1}")
    write_lines(lists / "classInd.txt", [f"{label + 1} {name}" for label, name in enumerate(CLASSES)])
    write_lines(lists / "trainlist01.txt", training)
    write_lines(lists / "testlist01.txt", val)
    return root, lists


def video_name(number: int) -> str:
    """Name video ``number``; as in UCF-101, a file's name may spell its class otherwise than the folder does."""
    folder = CLASSES[number // 3 % 3]
    return f"{folder}/v_{folder.replace('Handst', 'HandSt')}_g{number // 3 + 1:02d}_c{number % 3 + 1:02d}.avi"


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())  # UCF-101's lists end lines like this


def break_video(path: Path, how: str) -> None:
    """Damage a video file.

    Args:
        path: of the file.
        how: "cut" short, "cut a little", "garbled" in the middle, "empty", "text" or "missing".
    """
    content = path.read_bytes()
    third = len(content) // 3
    damaged = {
        "cut": content[: 2 * third],
        "cut a little": content[: int(0.97 * len(content))],
        "garbled": content[:third] + bytes(third) + content[2 * third :],
        "empty": b"",
        "text": b"no video\n" * 100,
    }
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[how])

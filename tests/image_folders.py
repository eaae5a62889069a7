"""Draws small folders of real pictures, as ImageNet lays them out, and WebDataset tars of pictures."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n02084071")
SIZES = ((50, 38), (33, 47), (160, 90), (20, 20), (81, 130))


def draw(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture (width, height) with some structure, different for every seed."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image) -> bytes:
    return encoded(picture, "JPEG", quality=92)


def encoded(picture: Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def write_class_folders(root: Path, per_class: int = 5, classes: Sequence[str] = CLASSES) -> list[str]:
    """Draw class folders; give the names below the root, sorted.

    Among them are what ImageNet has: grey-scale, CMYK, and a PNG that is called JPEG. Hidden files lie beside them.
    """
    names = []
    for number, class_name in enumerate(classes):
        folder = root / class_name
        folder.mkdir(parents=True)
        (folder / ".DS_Store").write_bytes(b"hidden")
        for place in range(per_class):
            picture = draw(100 * number + place, SIZES[(number + place) % len(SIZES)])
            kind = {1: "L", 2: "CMYK"}.get(place, "RGB")
            content = encoded(picture, "PNG") if place == 3 else jpeg(picture.convert(kind))
            names.append(f"{class_name}/{class_name}_{place}.JPEG")
            (root / names[-1]).write_bytes(content)
        (folder / f"._{class_name}_0.JPEG").write_bytes(b"what macOS leaves")
    return sorted(names)


def write_broken(folder: Path) -> list[str]:
    """Add pictures that cannot be read: cut short, empty, a text; give their names."""
    whole = jpeg(draw(7, (90, 70)))
    broken = {"broken_cut.JPEG": whole[: len(whole) // 2], "broken_empty.JPEG": b"", "broken_text.JPEG": b"no picture"}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    return sorted(broken)


def write_flat(root: Path, count: int = 9) -> list[str]:
    """Draw pictures as in ImageNet's validation set, all in one folder; give the class of each, in order of names."""
    root.mkdir(parents=True)
    classes = [CLASSES[(5 * number) % 3 if number % 2 else 2] for number in range(count)]
    for number in range(count):
        path = root / f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        path.write_bytes(jpeg(draw(1000 + number, SIZES[number % len(SIZES)])))
    return classes


def write_label_files(folder: Path, root: Path, classes: Sequence[str]) -> dict[str, Path]:
    """Write the classes of a flat folder in every form that is read."""
    names = sorted(path.name for path in root.iterdir())
    stems = [name.removesuffix(".JPEG") for name in names]
    boxes = [f"{c} 85 1 499 272 {c} 3 4 50 60 " for c in classes]
    lines = {
        "commas": [f"{name},{c}" for name, c in zip(names, classes, strict=True)],
        "tabs": ["picture\tclass", *(f"{stem}\t{c}" for stem, c in zip(stems, classes, strict=True))],
        "spaces": [f"{name}  {c}" for name, c in reversed(list(zip(names, classes, strict=True)))],
        "kaggle": [
            "ImageId,PredictionString",
            *(f"{s},{b}" for s, b in reversed(list(zip(stems, boxes, strict=True)))),
        ],
        "synsets": list(classes),
    }
    paths = {kind: folder / f"{kind}.txt" for kind in lines}
    for kind, path in paths.items():
        path.write_text("\n".join(lines[kind]) + "\n")
    return paths


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_tars(root: Path, counts: Sequence[int] = (4, 3), num_classes: int = 5) -> list[tuple[bytes, int]]:
    """Write WebDataset tars of pictures, their labels by turns in ``.cls`` and ``.json``; give contents and labels."""
    written = []
    for number, count in enumerate(counts):
        members: list[tuple[str, bytes]] = []
        for place in range(count):
            seed = 10 * number + place
            content, label = jpeg(draw(seed, SIZES[seed % len(SIZES)])), seed % num_classes
            about = json.dumps({"label": label, "caption": "none"}).encode()
            beside = ("cls", f"{label}\n".encode()) if place % 2 else ("json", about)
            members += [(f"train/{seed:06d}.jpg", content), (f"train/{seed:06d}.{beside[0]}", beside[1])]
            written.append((content, label))
        write_tar(root / f"train-{number:03d}.tar", members)
    return written

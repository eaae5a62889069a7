"""Writes small shards in the layout of ``elt encode``, with contents that tests know."""

import io
import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from elt_lightning.data.shards import Shard, ShardIndex

PIXELS = {"class_path": "elt_lightning.tokenizers.continuous.PixelScaling", "init_args": {}}


def token_index(counts: list[int], copies: int = 1, classes: int = 3) -> ShardIndex:
    """An index of shards of 4 tokens per picture, out of 300 codes."""
    return ShardIndex(
        classes=tuple(f"n{number:08d}" for number in range(classes)),
        image_size=32,
        copies=copies,
        input_shape=(2, 2),
        stored_shape=(4,),
        codebook_size=300,
        latent_scale=None,
        tokenizer=PIXELS,
        crop="adm-centre",
        shards=tuple(Shard(f"{number:05d}.tar", count) for number, count in enumerate(counts)),
    )


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def stored(number: int, index: ShardIndex) -> np.ndarray:
    """The codes of a picture: its number in every place; of the mirror image, a hundred more."""
    plain = np.full(index.stored_shape, number, dtype=np.int16 if index.codebook_size else np.float16)
    return np.stack([plain, plain + 100][: index.copies])


def write_shards(folder: Path, index: ShardIndex) -> str:
    """Write the shards and the index; picture i has class i mod classes."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    shards = []
    for shard in index.shards:
        crc = 0
        with tarfile.open(folder / shard.name, "w") as tar:
            for _ in range(shard.num_samples):
                about = {"label": number % len(index.classes), "source": f"{number}.JPEG"}
                members = {"codes.npy": npy(stored(number, index)), "json": json.dumps(about).encode()}
                crc = zlib.crc32(b"%09d" % number + b"".join(members.values()), crc)
                for ending, content in members.items():
                    add_member(tar, f"{number:09d}.{ending}", content)
                number += 1
        shards.append(replace(shard, crc32=crc))
    replace(index, shards=tuple(shards)).write(folder)
    return str(folder)

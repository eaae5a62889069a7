"""Sampled pictures in one npz file, as the ADM evaluator (openai/guided-diffusion, evaluations/) reads it."""

import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor

from elt_lightning.files import written_aside
from elt_lightning.tokenizers.base import to_bytes

PICTURES_AT_ONCE = 256


class SampleArchive:
    """Collects the pictures of all ranks on disk, then writes ``arr_0`` (N, H, W, C) uint8 and ``labels`` (N,).

    Picture i is of rank i mod ``world_size``, and each rank adds its own in order. What is not finished lies beside the
    file in ``<name>.parts``; memory holds a few pictures at a time.

    Args:
        path: the npz file.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, path: Path, rank: int = 0, world_size: int = 1) -> None:
        self.path, self.rank, self.world_size = path, rank, world_size
        self.parts = path.with_name(f"{path.name}.parts")
        self.parts.mkdir(parents=True, exist_ok=True)
        self._part(rank, "pictures").unlink(missing_ok=True)
        self._part(rank, "labels").unlink(missing_ok=True)

    def add(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        """Append pictures (n, H, W, C), or clips (n, F, H, W, C), uint8 and labels (n,), the next ones of this rank."""
        self._shape = pictures.shape[1:]
        for name, values in (("pictures", pictures), ("labels", labels.astype(np.int64))):
            with self._part(self.rank, name).open("ab") as file:
                file.write(np.ascontiguousarray(values).tobytes())

    def finish(self) -> None:
        """Join the parts; one rank does this when all have added theirs. The file appears whole or not at all."""
        ranks = range(self.world_size)
        pictures = [self._read(rank, "pictures", np.uint8, self._shape) for rank in ranks]
        labels = [self._read(rank, "labels", np.int64, ()) for rank in ranks]
        with written_aside(self.path) as aside, zipfile.ZipFile(aside, "w", allowZip64=True) as archive:
            for name, parts in (("arr_0", pictures), ("labels", labels)):
                total = sum(len(part) for part in parts)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {
                        "descr": parts[0].dtype.str,
                        "fortran_order": False,
                        "shape": (total, *parts[0].shape[1:]),
                    }
                    np.lib.format.write_array_header_1_0(member, header)
                    for start in range(0, total, PICTURES_AT_ONCE):
                        numbers = range(start, min(start + PICTURES_AT_ONCE, total))
                        chunk = [parts[number % self.world_size][number // self.world_size] for number in numbers]
                        member.write(np.stack(chunk).tobytes())
        del pictures, labels
        for file in self.parts.iterdir():
            file.unlink()
        self.parts.rmdir()

    def _part(self, rank: int, name: str) -> Path:
        return self.parts / f"{name}_{rank}.raw"

    def _read(self, rank: int, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        path = self._part(rank, name)
        if not path.exists():  # fewer samples than ranks
            return np.empty((0, *shape), dtype)
        return np.memmap(path, dtype, mode="r").reshape(-1, *shape)


def picture_array(pixels: Tensor) -> np.ndarray:
    """Turn pixels (B, C, …, H, W) float in [0, 1] into bytes as files hold them: (B, …, H, W, C) uint8."""
    return to_bytes(pixels).movedim(1, -1).cpu().numpy()

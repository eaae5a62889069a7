"""Patch vector quantisation: each patch of a picture becomes the nearest of a few stored patches."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.errors import UserError
from elt_lightning.files import is_file, written_aside
from elt_lightning.tokenizers.base import Tokenizer, to_bytes

LINE = 110
"""Grey of the lines between patches, where they are shown to people."""


class PatchVQTokenizer(Tokenizer):
    """Cut a grey picture into square patches and take each one's nearest codebook entry.

    Letters: B batch, V codes, P patch side, G grid height and width in patches.

    Args:
        path: a safetensors file from :meth:`save`: ``codebook`` (V, P, P) float in [0, 1] and the ``grid`` (2,).

    Raises:
        UserError: the file is missing or is not such a file.
    """

    codebook: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        if not is_file(path):
            raise UserError(
                f"the codebook {path} does not exist: `elt fit` makes it; `elt sample` takes --tokenizer_path"
            )
        try:
            with safe_open(path, framework="pt") as file:
                codebook, grid = file.get_tensor("codebook"), file.get_tensor("grid")
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a patch codebook ({error}): delete it, and the next `elt fit` makes it anew"
            ) from error
        self.register_buffer("codebook", codebook)
        self.grid: tuple[int, int] = tuple(grid.tolist())

    @staticmethod
    def save(path: str | Path, codebook: Tensor, grid: tuple[int, int]) -> None:
        """Write a codebook (V, P, P) for pictures of ``grid`` patches (height, width)."""
        with written_aside(path) as aside:
            save_file({"codebook": codebook.contiguous(), "grid": torch.tensor(grid)}, aside)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 1, G·P, G·P) float in [0, 1] to the nearest entries, (B, T) int64 in [0, V), row-major."""
        return self.nearest(cut_patches(pixels, self.codebook.shape[-1]))

    def nearest(self, patches: Tensor) -> Tensor:
        """Find each patch's nearest entry by squared distance: (…, P, P) to (…,) int64 in [0, V)."""
        return torch.cdist(patches.flatten(-2), self.codebook.flatten(1)).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (B, T) int64 to (B, 1, G·P, G·P) float in [0, 1]."""
        return join_patches(self.codebook[codes], self.grid)

    def present(self, pixels: Tensor) -> Tensor:
        """Show the patches with a line between them: (B, 1, G·(P + 1) + 1, G·(P + 1) + 1) uint8."""
        return with_lines(to_bytes(pixels), self.codebook.shape[-1])


def with_lines(pictures: Tensor, side: int) -> Tensor:
    """Draw a line around each cell of ``side`` pixels: (B, 1, R·side, C·side) uint8, wider by 1 pixel for each cell."""
    grid = (pictures.shape[2] // side, pictures.shape[3] // side)
    lined = join_patches(F.pad(cut_patches(pictures, side), (0, 1, 0, 1), value=LINE), grid)
    return F.pad(lined, (1, 0, 1, 0), value=LINE)


def cut_patches(pixels: Tensor, side: int) -> Tensor:
    """Cut (B, 1, H, W) into (B, T, side, side), row-major."""
    return pixels.unfold(2, side, side).unfold(3, side, side).flatten(1, 3)


def join_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay patches (B, T, P, P) out on a grid (height, width), as one picture (B, 1, height·P, width·P)."""
    rows, columns = grid
    side = patches.shape[-1]
    return patches.unflatten(1, grid).permute(0, 1, 3, 2, 4).reshape(len(patches), 1, rows * side, columns * side)

"""A model with its tokenizer: from classes to pictures, for people."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from elt_lightning.checkpoints.pretrained import build_module, read_pretrained
from elt_lightning.checkpoints.recipe import found
from elt_lightning.checkpoints.store import Weights
from elt_lightning.errors import UserError, check_most
from elt_lightning.evaluation.given import Hole, read_given
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.tokenizers.loading import load_tokenizer
from elt_lightning.tokenizers.patch_vq import PatchVQTokenizer

Asked = int | Literal["auto"] | None
"""A loop count; "auto", until the tolerance is met; None for the count of training."""


NUMBERS = {"guidance": Real, "exit_scale": Real, "weak_loops": Integral, "tolerance": Real}
"""Settings of samplers that are compared with numbers."""


class Drawing:
    """A trained model that draws pictures, or clips.

    Attributes:
        module: the model itself, an :class:`~elt_lightning.model.ELTModel`.
        tokenizer: turns what it samples into pixels.
        recipe: how model, data and tokenizer were built, as the checkpoint says.
    """

    def __init__(
        self, source: str | Path, weights: Weights | None = None, tokenizer_path: str | Path | None = None
    ) -> None:
        checkpoint = read_pretrained(source)
        self.recipe = checkpoint["elt"]
        self.module = build_module(checkpoint, weights)
        place = None if tokenizer_path is None else str(tokenizer_path)
        self.tokenizer = load_tokenizer(found(self.recipe, "tokenizer"), place)

    @property
    def num_classes(self) -> int:
        """The classes are 0 to this less one."""
        return self.module.num_classes

    def to(self, *place: Any, **named: Any) -> Self:
        """Move model and tokenizer to a device, or the model to a dtype, as `torch.nn.Module.to` does."""
        self.module.to(*place, **named)
        self.tokenizer.to(self.module.device)
        return self

    def sampler(self, loops: Asked = None, **settings: Any) -> tuple[Sampler, int]:
        """Return the model's sampler with settings changed, and the loop count.

        Raises:
            UserError: the sampler has no such setting, or it does not go with the model or the loop count.
        """
        for name, kind in NUMBERS.items():
            value = settings.get(name, 0)
            if not (isinstance(value, kind) or (value is None and name in ("weak_loops", "tolerance"))):
                raise UserError(f"{name} is a {'whole ' * (kind is Integral)}number, not {value!r}")
        if isinstance(loops, Integral):
            check_most(loops=int(loops))
        try:
            sampler = self.module.sampler.with_settings(**settings).suited_to(self.module.network.has_recall)
            count = self.module.loop_count(loops, sampler)
            sampler.loops_per_step(count)
        except ValueError as error:
            raise UserError(str(error)) from error
        return sampler, count

    def labels(self, classes: Sequence[int | None] | None, num: int) -> Tensor:
        """Take classes in turn, all of them by default, for ``num`` samples: (num,) int64; None is for no class.

        Raises:
            UserError: the model has no such class, or none is given.
        """
        known = range(self.num_classes)
        chosen = list(known if classes is None else classes)
        if not chosen:
            raise UserError("classes: there is none to draw; [None] is one picture of no class")
        if wrong := [number for number in chosen if number is not None and number not in known]:
            raise UserError(f"the model's classes are 0 to {self.num_classes - 1}, not {wrong[0]}")
        numbers = [self.num_classes if number is None else number for number in chosen]
        return torch.tensor(numbers, dtype=torch.int64, device=self.module.device)[torch.arange(num) % len(chosen)]

    def codes(
        self,
        labels: Tensor,
        loops: int,
        sampler: Sampler,
        seed: int = 0,
        known: Tensor | None = None,
        spent: list[Tensor] | None = None,
    ) -> Tensor:
        """Draw a sample for each label (B,), as codes (B, …); see :meth:`~elt_lightning.model.ELTModel.sample`.

        Raises:
            UserError: the seed is no whole number in [0, 2³¹).
        """
        if not (isinstance(seed, Integral) and 0 <= seed < 2**31):
            raise UserError(f"a seed is a whole number from 0 to {2**31 - 1}, not {seed!r}")
        seeds = sample_seeds(int(seed), torch.arange(len(labels), device=labels.device))
        return self.module.sample(labels, loops, seeds, known, sampler, spent)

    def shown(self, codes: Tensor) -> Tensor:
        """Turn codes into (B, C, H, W), or clips (B, C, F, H, W), uint8 on the CPU, as people are shown them."""
        return self.tokenizer.present(self.tokenizer.decode(codes)).cpu()

    def given(self, path: str | Path, frames: int | None = None, hole: Hole | None = None, stride: int = 1) -> Tensor:
        """Encode what is given of a picture or clip, for :meth:`draw`.

        Args:
            path: of the file; it is resized and cropped to what the model draws.
            frames: the first frames of the token grid that are given; None for all.
            hole: top, left, bottom and right of the cells of that grid that are not; None for no hole.
            stride: frames of the file from one to the next.

        Raises:
            UserError: the file cannot be read, or the given part does not lie in the grid.
        """
        return read_given(Path(path), self.module, self.tokenizer, frames, hole, stride).known

    def board(self) -> tuple[int, int, int]:
        """Return the rows and columns of cells, and the ways of writing each of the digits from 1 to the rows.

        Raises:
            UserError: the model does not draw digits in cells.
        """
        if not isinstance(self.tokenizer, PatchVQTokenizer) or len(self.tokenizer.codebook) % self.tokenizer.grid[0]:
            raise UserError("this model does not draw digits in cells: what is given takes a picture, see given()")
        rows, columns = self.tokenizer.grid
        return rows, columns, len(self.tokenizer.codebook) // rows

    def clues(self, digits: Mapping[tuple[int, int], int]) -> Tensor:
        """Encode cells of a square or sudoku that are given, for :meth:`draw`: (1, T) int64, V elsewhere.

        Args:
            digits: {(row, column): digit}, counted from 0 and digits from 1, each in its first way of writing.

        Raises:
            UserError: the model does not draw digits in cells, or there is no such cell or digit.
        """
        rows, columns, ways = self.board()
        known = torch.full((1, rows * columns), rows * ways, device=self.module.device)
        for cell, digit in digits.items():
            if not (
                isinstance(cell, tuple) and len(cell) == 2 and all(isinstance(n, Integral) for n in (*cell, digit))
            ):
                raise UserError(f"what is given is {{(row, column): digit}}, whole numbers, not {cell!r}: {digit!r}")
            row, column = cell
            if row not in range(rows) or column not in range(columns) or digit not in range(1, rows + 1):
                raise UserError(f"no cell of {rows}×{columns}, or no digit from 1 to {rows}: {(row, column)}: {digit}")
            known[0, row * columns + column] = (digit - 1) * ways
        return known

    def digits(self, codes: Tensor) -> Tensor:
        """Read the digits of codes (B, T), the other way from :meth:`clues`: (B, rows, columns) int64 from 1 up.

        Raises:
            UserError: the model does not draw digits in cells.
        """
        rows, columns, ways = self.board()
        return codes.unflatten(1, (rows, columns)) // ways + 1

    def known(self, given: Tensor | Mapping[tuple[int, int], int], num: int) -> Tensor:
        """Return what is given, for each of ``num`` samples: (num, …); see :meth:`draw`.

        Raises:
            UserError: it is no part of what the model samples.
        """
        if not isinstance(given, Tensor | Mapping):
            raise UserError(f"what is given is of given(), or {{(row, column): digit}}, not {given!r}")
        known = given if isinstance(given, Tensor) else self.clues(given)
        shape, codes = self.module.network.sample_shape, self.module.codebook_size
        if not (codes is None or known.is_floating_point()):
            known = known.long()  # as embeddings take them
        if known.shape[1:] != shape or len(known) not in (1, num):
            raise UserError(f"what is given has the shape {tuple(known.shape)}, the samples {(num, *shape)}")
        if codes is not None and (known.is_floating_point() or not ((known >= 0) & (known <= codes)).all()):
            raise UserError(f"what is given are codes from 0 to {codes - 1}, and {codes} where nothing is")
        return known.to(self.module.device).expand(num, *shape)

    def draw(
        self,
        classes: Sequence[int | None] | None = None,
        loops: Asked = None,
        seed: int = 0,
        given: Tensor | Mapping[tuple[int, int], int] | None = None,
        **settings: Any,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Draw one picture for each class, all of them by default; of clips a list of frames for each.

        The same seed gives the same attempt at every loop count.

        Args:
            classes: numbers from 0 up; the same one may be asked for several times. None among them is for no class.
            loops: how often the shared layers are run in each sampling step; by default as often as in training;
                "auto" ends each sample's loop when it changes by less than a ``tolerance``.
            seed: decides every picture.
            given: what stays as it is in every picture: of :meth:`given`, or digits as :meth:`clues` takes them.
            settings: of the sampler: ``steps``, ``guidance``, ``carry_state``, ``exit_scale``, ``weak_loops``,
                ``loop_schedule``, ``tolerance``.

        Raises:
            UserError: the model has no such class or setting, there is no such seed, or what is given does not fit.
        """
        if classes is not None and not hasattr(classes, "__len__"):
            raise UserError(f"classes are a list of numbers, such as [0, 0, 3], not {classes!r}")
        labels = self.labels(classes, self.num_classes if classes is None else len(classes))
        sampler, count = self.sampler(loops, **settings)
        known = None if given is None else self.known(given, len(labels))
        samples = self.shown(self.codes(labels, count, sampler, seed, known))
        if samples.ndim == 4:
            return [picture_of(pixels) for pixels in samples]
        return [frames_of(clip) for clip in samples]


def load(source: str | Path, weights: Weights | None = None, tokenizer_path: str | Path | None = None) -> Drawing:
    """Return a trained model with its tokenizer, ready to draw on the CPU.

    Args:
        source: the name of a model that comes along, which `elt models` lists; a checkpoint of `elt fit`; a folder of
            `elt export`; or its name ``owner/name`` on Hugging Face.
        weights: "ema", "raw"; by default the averaged ones, or those that were exported.
        tokenizer_path: where the tokenizer's file lies, if it has moved.

    Raises:
        UserError: there is no such model, or its tokenizer's file is missing.
    """
    return Drawing(source, weights, tokenizer_path)


def picture_of(pixels: Tensor) -> Image.Image:
    """Return pixels (C, H, W) uint8, C 1 or 3, as a picture of Pillow."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def frames_of(clip: Tensor) -> list[Image.Image]:
    """Return a clip (C, F, H, W) uint8, C 1 or 3, as pictures of Pillow."""
    return [picture_of(frame) for frame in clip.unbind(1)]

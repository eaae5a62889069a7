"""Tokenizers of one's own, from the file that training them writes: clips in 3-D, pictures in 2-D."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.files import is_file, written_aside
from elt_lightning.tokenizers.base import ImageTokenizer, Tokenizer
from elt_lightning.tokenizers.vq_network import VQNetwork, VQSettings
from elt_lightning.training.weights import freeze

FORMAT = "elt_lightning.vq.1"


class TrainedVQ(Tokenizer):
    """What tokenizers of clips and of pictures share. Frozen, float32; ``.to(dtype)`` changes that.

    Letters: B batch, F H W frames, height and width in pixels, T tokens, V codes.

    Args:
        path: the ``tokenizer.safetensors`` that :class:`~elt_lightning.tokenizers.vq_training.VQTraining` wrote.

    Raises:
        UserError: there is no such file, it holds something else, or it is for other dimensions.
    """

    dimensions: ClassVar[int]
    codebook_size: int | None

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.network, self.sample_shape = read_tokenizer(path)
        self.settings = self.network.settings
        if self.settings.dimensions != self.dimensions:
            kind = {2: "of pictures: ImageVQ", 3: "of clips: VideoVQ"}[self.settings.dimensions]
            raise UserError(f"{path} is a tokenizer {kind} reads it, not {type(self).__name__}")
        self.codebook_size, self.grid = self.settings.codebook_size, self.settings.grid(self.sample_shape)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, F, H, W), or (B, 3, H, W), in [0, 1] to the nearest codes, (B, T) int64 in [0, V), row-major.

        T runs over frames, rows, columns.

        Raises:
            ValueError: the size does not divide into tokens.
        """
        return self.network.encode(pixels.to(self.network.quantizer.codebook.dtype))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (B, T) int64 to (B, 3, F, H, W), or (B, 3, H, W), float in [0, 1].

        The grid is that of the samples in training. Where T is another number, clips may have more or fewer frames of
        that height and width, and pictures may be square.

        Raises:
            ValueError: T tokens make no such clip or picture.
        """
        return self.network.decode(codes, self.grid_of(codes.shape[1])).clamp(0, 1)

    def grid_of(self, tokens: int) -> tuple[int, ...]:
        """Return how T tokens lie (ValueError: they make no clip or picture)."""
        if tokens == math.prod(self.grid):
            return self.grid
        if self.dimensions == 3:
            grid = (tokens // math.prod(self.grid[1:]), *self.grid[1:])
        else:
            grid = (math.isqrt(tokens),) * 2
        if math.prod(grid) != tokens or tokens == 0:
            raise ValueError(f"{tokens} tokens are neither a grid of {self.grid} nor of a shape that follows from it")
        return grid


class VideoVQ(TrainedVQ):
    """A tokenizer of clips: MAGVIT's 3D-VQ, or a smaller network of its kind.

    Attributes:
        codebook_size: V.
        downsampling: frames, height and width in pixels of what one code stands for.
    """

    dimensions = 3

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.downsampling = self.settings.downsampling

    def code_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the token grid (frames, rows, columns) of a clip of that size in pixels.

        Raises:
            ValueError: the size does not divide into tokens.
        """
        return self.settings.grid((frames, height, width))


class ImageVQ(TrainedVQ, ImageTokenizer):
    """A tokenizer of pictures: the same network in 2-D."""

    dimensions = 2

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.downsampling = self.settings.downsampling[0]


def write_tokenizer(path: str | Path, network: VQNetwork, sample_shape: tuple[int, ...]) -> None:
    """Write a network's weights and settings as safetensors; a reader never meets half a file.

    Args:
        path: of the file.
        network: what is written.
        sample_shape: (frames, height, width) or (height, width) of what it was trained on.
    """
    settings = asdict(network.settings) | {"sample_shape": sample_shape}
    state = {name: weight.detach().float().cpu().contiguous() for name, weight in network.state_dict().items()}
    with written_aside(path) as aside:
        save_file(state, aside, {"format": FORMAT, "settings": json.dumps(settings)})


def read_tokenizer(path: str) -> tuple[VQNetwork, tuple[int, ...]]:
    """Read what :func:`write_tokenizer` wrote: the frozen network on the CPU, and the shape it was trained on.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not is_file(path):
        raise UserError(
            f"there is no tokenizer {path}: training one writes tokenizer.safetensors into its run's folder; "
            "`elt sample` takes --tokenizer_path"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): copy it anew, or train again") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a tokenizer that elt_lightning trained: its metadata do not say {FORMAT}")
    try:
        values = json.loads(metadata["settings"])
        shape = tuple(values.pop("sample_shape"))
        settings = VQSettings(**values | {"multipliers": tuple(values["multipliers"])})
        settings.grid(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the settings in {path} are not those of a tokenizer ({error}): train it again") from error
    with torch.device("meta"):
        network = VQNetwork(settings)
    freeze(network, state, f"the weights in {path} do not fit its settings", "train it again")
    return network, shape

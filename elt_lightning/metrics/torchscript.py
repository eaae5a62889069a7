"""Networks of clips that are published as TorchScript files, of which nothing but the file is known here.

``torch.jit.load`` runs a file's program inside the TorchScript interpreter, which knows no Python. It is a program all
the same: load files from where they are published, and compare their SHA-256.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from elt_lightning.errors import UserError
from elt_lightning.files import is_file, sha256
from elt_lightning.metrics.inception import full_float32
from elt_lightning.tokenizers.base import to_bytes

AT_ONCE = 16
"""Clips in one forward pass, which bounds memory; it does not change results."""


class TorchScriptNetwork(nn.Module):
    """A published network of clips, frozen, always in eval mode and in float32.

    Letters: B batch, F frames, H W height and width.
    """

    title: str  # what the network is called
    setting: str  # the setting of a data module that takes the file's path
    url: str  # where the file is published
    published_sha256: str = ""  # of the published file; empty where nobody states it
    arguments: tuple[str, ...] = ()  # that its forward method takes, beside the clips
    num_outputs: int  # numbers that it gives for each clip

    def __init__(self, script: torch.jit.ScriptModule, sha256: str = "") -> None:
        super().__init__()
        self.script, self.sha256 = script, sha256
        self.requires_grad_(False)
        self.eval()

    @property
    def name(self) -> str:
        """The network's name; one whose file is known not to be the published one is named by its SHA-256 too."""
        published = self.sha256 == self.published_sha256 or not self.published_sha256
        return self.title if published else f"{self.title} of another file ({self.sha256[:8]})"

    @classmethod
    def where(cls) -> str:
        """Return where the file is found, and how it is passed."""
        return f"{cls.title} is published with StyleGAN-V at {cls.url}: give its path as {cls.setting}"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load the published file (UserError: it is missing, is no TorchScript file, or is that of another network)."""
        if not is_file(path):
            raise UserError(f"{path} does not exist: {cls.where()}")
        try:
            script = torch.jit.load(str(path), map_location="cpu")
            taken = [argument.name for argument in script.forward.schema.arguments]
        except Exception as error:  # whatever a broken file makes the loader raise
            raise UserError(f"{path} is not a TorchScript file ({type(error).__name__}): {cls.where()}") from error
        if not set(cls.arguments) <= set(taken):
            raise UserError(
                f"{path} takes {', '.join(taken)}, not {', '.join(cls.arguments)}, so it is another network: "
                f"{cls.where()}"
            )
        return cls(script, sha256(path))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters(), torch.empty(0)).device

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    def read(self, clips: Tensor, **settings: Any) -> Tensor:
        """Pass clips (B, 3, F, H, W) through the network: (B, ``num_outputs``) float32.

        Autocast, the fast matrix arithmetic of GPUs and the interpreter's own rewriting are off meanwhile, for scores
        that do not depend on them.

        Raises:
            UserError: the network gives another shape.
        """
        with (
            torch.no_grad(),
            torch.autocast(clips.device.type, enabled=False),
            torch.jit.optimized_execution(False),
            full_float32(),
        ):
            outputs = self.script(clips, **settings)
        if outputs.shape != (len(clips), self.num_outputs):
            raise UserError(
                f"{self.title} gave {tuple(outputs.shape)}, not {(len(clips), self.num_outputs)}, so its file is that "
                f"of another network: {self.where()}"
            )
        return outputs.float()


def clip_bytes(pixels: Tensor) -> Tensor:
    """Turn clips (B, 3 or 1, F, H, W), float in [0, 1] or bytes, into bytes (B, 3, F, H, W); grey becomes colour.

    Raises:
        ValueError: another shape.
    """
    if pixels.ndim != 5 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"clips are (B, 3 or 1, F, H, W), not {tuple(pixels.shape)}")
    bytes_ = pixels if pixels.dtype == torch.uint8 else to_bytes(pixels)
    return bytes_.expand(-1, 3, -1, -1, -1).contiguous()

"""The callback of a training that puts the recipe into its checkpoints."""

import os
from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer

from elt_lightning.checkpoints.recipe import FORMAT_VERSION


class Recipe(Callback):
    """Store ``checkpoint["elt"]`` for :mod:`elt_lightning.checkpoints.store`; relative paths are of its ``folder``.

    Args:
        model: resolved ``model`` section of the config, with what was linked from the data filled in.
        data: resolved ``data`` section.
        tokenizer: returns the description of the data's tokenizer.
    """

    def __init__(self, model: dict[str, Any], data: dict[str, Any], tokenizer: Callable[[], dict[str, Any]]) -> None:
        self.recipe = {"version": FORMAT_VERSION, "folder": os.getcwd(), "model": model, "data": data}
        self.tokenizer = tokenizer

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        checkpoint["elt"] = self.recipe | {"tokenizer": self.tokenizer()}

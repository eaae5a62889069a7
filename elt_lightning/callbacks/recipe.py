"""Writes into every checkpoint how to build the model, the data module and the tokenizer again."""

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from elt_lightning.data.base import GenerativeDataModule


class Recipe(Callback):
    """Store ``checkpoint["elt"]``, which :mod:`elt_lightning.checkpoints` reads.

    Args:
        version: of the checkpoint's format.
        model: resolved ``model`` section of the config, with what was linked from the data filled in.
        data: resolved ``data`` section.
    """

    def __init__(self, version: int, model: dict[str, Any], data: dict[str, Any]) -> None:
        self.recipe = {"version": version, "model": model, "data": data}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        data = cast(GenerativeDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        checkpoint["elt"] = self.recipe | {"tokenizer": data.tokenizer_description()}

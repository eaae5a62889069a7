"""A checkpoint's model with the data it is judged by, measured at one setting after another without a trainer."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from elt_lightning.checkpoints.pretrained import build_module, meant
from elt_lightning.checkpoints.recipe import found
from elt_lightning.checkpoints.store import Weights, read_checkpoint
from elt_lightning.data.base import VAL_LOSS, GenerativeDataModule
from elt_lightning.errors import UserError
from elt_lightning.evaluation.sweep import Row, Sweep
from elt_lightning.metrics.base import SampleMetric, scored_as
from elt_lightning.metrics.moments import with_float64
from elt_lightning.samplers.base import Sampler


class Trained:
    """A trained model, its data and its metrics, on one device.

    Args:
        path: of a checkpoint; exported models do not say which data they are judged by.
        device: where samples are drawn.
        weights: averaged or raw; see :func:`~elt_lightning.checkpoints.pretrained.meant`.

    Raises:
        UserError: it cannot be read, or its data cannot be built, have no metric of samples, or another tokenizer now.
    """

    def __init__(self, path: str | Path, device: torch.device, weights: Weights | None = None) -> None:
        checkpoint = read_checkpoint(path)
        self.recipe: dict[str, Any] = checkpoint["elt"]
        self.train_steps = checkpoint["global_step"]
        self.weights = meant(checkpoint, weights)
        self.module = build_module(checkpoint, self.weights).to(device)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(GenerativeDataModule, "data")
        try:
            described = parser.parse_object({"data": found(self.recipe, "data")})
            self.data: GenerativeDataModule = parser.instantiate(described).data
        except UserError:
            raise
        except Exception as error:  # a class may raise anything on settings that do not suit it
            raise UserError(f"the data that {path} describes cannot be built: {error}") from error
        if self.data.primary_metric == VAL_LOSS:
            raise UserError(f"{path}: its data have no metric of samples, which settings could be compared by")
        self.data.prepare_data()
        self.data.setup("test")
        self.data.load_state_dict({"tokenizer": self.recipe["tokenizer"]})  # refuses another one
        self.tokenizer = self.data.tokenizer.to(device)

    @cached_property
    def metrics(self) -> Sequence[SampleMetric]:
        """The data's metrics; their references are measured once."""
        return [metric.to(with_float64(self.module.device)) for metric in self.data.build_metrics()]

    def measure(self, loops: int, sampler: Sampler, sweep: Sweep, **settings: Any) -> Row:
        """Measure one setting, see :meth:`Sweep.run`."""
        return sweep.run(self.module, sampler, self.tokenizer, self.metrics, loops, self.data.request, **settings)

    def score(self, row: Row) -> float:
        """Return the mean of the primary metric."""
        return row.mean(scored_as(self.data.primary_metric, list(row.metrics)))

"""Writes samples at scale: what `elt predict` does, over any number of devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from elt_lightning.data.base import GenerativeDataModule, Request
from elt_lightning.evaluation.archives import SampleArchive, picture_array
from elt_lightning.files import written_aside
from elt_lightning.training.module import ELTModule


class SampleWriter(BasePredictionWriter):
    """Draw samples and write them into the run's folder: sample i is of class i mod num_classes.

    Args:
        num_samples: how many.
        loops: loop count; by default the one of training.
        batch_size: samples drawn at once on one device.
        format: "npz" for one ``samples.npz``, a :class:`~elt_lightning.evaluation.archives.SampleArchive`; "png" for
            ``samples/<number>_class_<label>.png``.
    """

    def __init__(
        self,
        num_samples: int = 1000,
        loops: int | None = None,
        batch_size: int = 250,
        format: Literal["npz", "png"] = "npz",  # noqa: A002
    ) -> None:
        super().__init__(write_interval="batch")
        if num_samples < 1 or batch_size < 1 or (loops is not None and loops < 1):
            raise ValueError(f"need num_samples, batch_size and loops >= 1, not {num_samples}, {batch_size}, {loops}")
        self.num_samples, self.loops, self.batch_size, self.format = num_samples, loops, batch_size, format

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the data module for the samples."""
        if stage == "predict":
            _data(trainer).request_samples(self.num_samples, self.batch_size)
            module = cast(ELTModule, pl_module)
            module.prediction_loops = self.loops or module.max_loops
            self.folder = Path(trainer.log_dir or trainer.default_root_dir)
            if self.format == "npz":
                self.archive = SampleArchive(self.folder / "samples.npz", trainer.global_rank, trainer.world_size)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Request,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Decode a batch and write it: as pictures, or into the archive."""
        pixels = _data(trainer).tokenizer.to(pl_module.device).decode(prediction)
        pictures = picture_array(pixels)
        labels, indices = batch.labels.cpu().numpy(), batch.indices.cpu().numpy()
        if self.format == "npz":
            self.archive.add(pictures, labels)
            return
        for picture, label, number in zip(pictures, labels, indices, strict=True):
            with written_aside(self.folder / "samples" / f"{number:08d}_class_{label}.png") as aside:
                Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(aside)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts of all devices."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        if self.format == "png":
            print(f"{self.num_samples} pictures in {self.folder / 'samples'}")
            return
        self.archive.finish()
        print(f"{self.num_samples} samples in {self.folder / 'samples.npz'}")


def _data(trainer: Trainer) -> GenerativeDataModule:
    return cast(GenerativeDataModule, trainer.datamodule)  # type: ignore[attr-defined]

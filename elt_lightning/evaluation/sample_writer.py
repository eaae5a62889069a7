"""Writes samples at scale: what `elt predict` does, over any number of devices."""

from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from elt_lightning.data.base import Request, data_of
from elt_lightning.errors import check_most
from elt_lightning.evaluation.archives import SampleArchive, picture_array
from elt_lightning.evaluation.spent import SpentLoops, in_brief
from elt_lightning.files import written_aside
from elt_lightning.training.announce import announce
from elt_lightning.training.module import ELTModule
from elt_lightning.training.progress import meter
from elt_lightning.training.runs import run_folder


class SampleWriter(Callback):
    """Draw samples and write them into the run's folder: sample i is of class i mod num_classes.

    Args:
        num_samples: how many.
        loops: loop count; by default the one of training; "auto" leaves it to the sampler's tolerance.
        batch_size: samples drawn at once on one device.
        format: "npz" for one ``samples.npz``, a :class:`~elt_lightning.evaluation.archives.SampleArchive`; "png" for
            ``samples/<number>_class_<label>.png``.
    """

    def __init__(
        self,
        num_samples: int = 1000,
        loops: int | Literal["auto"] | None = None,
        batch_size: int = 250,
        format: Literal["npz", "png"] = "npz",  # noqa: A002
    ) -> None:
        if num_samples < 1 or batch_size < 1 or (isinstance(loops, int) and loops < 1):
            raise ValueError(f"need num_samples, batch_size and loops >= 1, not {num_samples}, {batch_size}, {loops}")
        check_most(num_samples=num_samples, loops=loops if isinstance(loops, int) else None)
        self.num_samples, self.loops, self.batch_size, self.format = num_samples, loops, batch_size, format

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the data module for the samples (UserError: a loop is to end by itself, and nothing says when)."""
        if stage == "predict":
            loops = cast(ELTModule, pl_module).loop_count(self.loops)
            data_of(trainer).request_samples(self.num_samples, self.batch_size, loops)
            self.folder = run_folder(trainer)
            if self.format == "npz":
                self.archive = SampleArchive(self.folder / "samples.npz", trainer.global_rank, trainer.world_size)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what long work takes, and begin to count: the trainer may draw fewer samples than were asked for."""
        devices, module = trainer.world_size, cast(ELTModule, pl_module)
        limit = trainer.num_predict_batches[0] * self.batch_size * devices
        samples = int(min(self.num_samples, limit))
        macs = samples * module.macs_per_sample(module.loop_count(self.loops)) // devices
        with trainer.precision_plugin.forward_context():
            announce("predict", macs, module, module.sampler, min(self.batch_size, samples))
        self._written = 0
        per_step = module.sampler.loops_per_step(module.loop_count(self.loops))
        self._spent = SpentLoops(per_step).to(module.device)
        self._meter = meter(trainer, samples, "sample").__enter__()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: tuple[Tensor, Tensor], batch: Request, *_: Any
    ) -> None:
        """Decode a batch and write it: as pictures, or into the archive."""
        codes, spent = outputs
        self._spent.update(spent)
        pixels = data_of(trainer).tokenizer.to(pl_module.device).decode(codes)
        pictures = picture_array(pixels)
        labels, indices = batch.labels.cpu().numpy(), batch.indices.cpu().numpy()
        if self.format == "npz":
            self.archive.add(pictures, labels)
        else:
            for picture, label, number in zip(pictures, labels, indices, strict=True):
                with written_aside(self.folder / "samples" / f"{number:08d}_class_{label}.png") as aside:
                    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(aside)
        self._written += len(labels)
        loops = batch.loops or cast(ELTModule, pl_module).max_loops
        self._meter.show(self._written * trainer.world_size, lambda: f"loops {loops}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts of all devices, and say how many samples they are and, with a tolerance, their loops."""
        self._meter.__exit__(None, None, None)
        written = int(trainer.strategy.reduce(torch.tensor(self._written, device=pl_module.device), reduce_op="sum"))
        per_sample = self._spent.compute()[1]  # over all ranks
        if not trainer.is_global_zero:
            return
        if self.format == "npz":
            self.archive.finish()
        path = self.folder / ("samples.npz" if self.format == "npz" else "samples")
        fewer = f", of {self.num_samples} asked for," if written < self.num_samples else ""
        print(f"{written} {'samples' if self.format == 'npz' else 'pictures'}{fewer} in {path}")
        if cast(ELTModule, pl_module).sampler.loop_schedule.tolerance is not None:
            print(f"loops: {in_brief(per_sample)}, the mean over steps and samples (10 and 90 % of samples)")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the meter, which hands the terminal back."""
        if hasattr(self, "_meter"):
            self._meter.__exit__(None, None, None)

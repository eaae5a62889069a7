"""Metrics at every loop count: in validation to the logger, in test as the sweep with its report."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from elt_lightning.data.base import VAL_LOSS, Batch, data_of
from elt_lightning.errors import UserError, check_most
from elt_lightning.evaluation.archives import SampleArchive
from elt_lightning.evaluation.memorisation import write_nearest
from elt_lightning.evaluation.report import Report, in_words, labelled_pictures, picture_row, write_reconstruction
from elt_lightning.evaluation.sweep import Row, Sweep, swept_settings
from elt_lightning.metrics.base import SampleMetric, scored_as
from elt_lightning.metrics.moments import with_float64
from elt_lightning.model import AUTO_LOOPS
from elt_lightning.samplers.base import Sampler
from elt_lightning.samplers.loop_schedule import LoopShape
from elt_lightning.training.announce import announce
from elt_lightning.training.charts import log_table
from elt_lightning.training.ema import EMA
from elt_lightning.training.module import ELTModule
from elt_lightning.training.preemption import end_if_asked
from elt_lightning.training.progress import meter
from elt_lightning.training.runs import callbacks_of, log_picture, run_folder

logger = logging.getLogger(__name__)

MOST_UNASKED = 1000
"""Loop counts that are measured without being named."""


class LoopMetrics(Callback):
    """Draw samples at every loop count, with the same labels and seeds at each, and score them.

    In validation it logs ``val/<metric>@L<loops>`` and a picture whose rows are loop counts. ``elt test`` runs it as
    the sweep: it prints a table and writes ``loops.json``, ``loops.csv``, ``loops.png`` and ``pareto.png`` into the
    run's folder.

    Args:
        loops: loop counts to measure; by default 1 … L_max. "auto" leaves them to a tolerance, at most
            8·L_max.
        guidance: guidance scales to sweep in test; by default the sampler's own. Validation uses the sampler's own, of
            this and of all that follow.
        carry_state: whether the sampler carries the loop's state from step to step: false, true, or both.
        exit_scale: strengths of exit guidance, w.
        weak_loops: its weak exits, r.
        tolerance: tolerances at which a sample's loop ends.
        loop_schedule: how loops are spread over sampling steps: constant, falling, rising.
        steps: numbers of sampling steps.
        num_samples: samples per repeat in test.
        num_validation_samples: samples in each validation; 0 measures nothing there.
        batch_size: samples drawn at once on one device.
        repeats: independent repeats in test, for a standard deviation.
        seed: of the first repeat.
        num_pictures: samples shown for each loop count.
        save_samples: in test, also write the samples of each loop count: ``samples.npz`` makes ``samples_L4.npz``, …,
            each a :class:`~elt_lightning.evaluation.archives.SampleArchive`. A relative path is one in the run's
            folder.
        reconstruction: in test, also score the held-out pictures after encoding and decoding, the best that any model
            of these codes can reach. Without a checkpoint that is all that is done.
        nearest: in test, also show samples beside the nearest training samples, all of which are decoded for it.
        diversity: in test, also score how varied the samples are: precision, recall and coverage over the features of
            the Fréchet distance, distinct squares of puzzles.
        metrics: further metrics, beside those of the data module.
    """

    def __init__(
        self,
        loops: list[int] | Literal["auto"] | None = None,
        guidance: list[float] | None = None,
        carry_state: list[bool] | None = None,
        exit_scale: list[float] | None = None,
        weak_loops: list[int] | None = None,
        tolerance: list[float] | None = None,
        loop_schedule: list[LoopShape] | None = None,
        steps: list[int] | None = None,
        num_samples: int = 1000,
        num_validation_samples: int = 200,
        batch_size: int = 250,
        repeats: int = 1,
        seed: int = 0,
        num_pictures: int = 8,
        save_samples: str | None = None,
        reconstruction: bool = False,
        nearest: bool = False,
        diversity: bool = False,
        metrics: list[SampleMetric] | None = None,
    ) -> None:
        if isinstance(loops, list) and (not loops or min(loops) < 1):
            raise ValueError(f"loops must be numbers from 1 up, not {loops}")
        if guidance is not None and not (guidance and all(0 <= scale < math.inf for scale in guidance)):
            raise ValueError(f"guidance must be numbers from 0 up, not {guidance}")
        self.swept: dict[str, list[Any] | None] = {
            "steps": steps,
            "carry_state": carry_state,
            "guidance": guidance,
            "exit_scale": exit_scale,
            "weak_loops": weak_loops,
            "loop_schedule": loop_schedule,
            "tolerance": tolerance,
        }
        if empty := [name for name, values in self.swept.items() if values == []]:
            raise ValueError(f"{empty[0]} must be one value or more, not an empty list")
        if num_samples < 2 or num_validation_samples < 0 or batch_size < 1 or repeats < 1 or num_pictures < 1:
            raise ValueError(
                "need num_samples >= 2, num_validation_samples >= 0, and batch_size, repeats, num_pictures >= 1"
            )
        check_most(
            num_samples=num_samples * repeats,
            num_validation_samples=num_validation_samples,
            loops=max(loops) if isinstance(loops, list) else None,
        )
        self.loops = loops
        self.num_samples, self.num_validation_samples = num_samples, num_validation_samples
        self.batch_size, self.repeats, self.seed, self.num_pictures = batch_size, repeats, seed, num_pictures
        if save_samples is not None and not save_samples.endswith(".npz"):
            raise ValueError(f"save_samples must end in .npz, not {save_samples}")
        self.save_samples, self.reconstruction, self.nearest = save_samples, reconstruction, nearest
        self.diversity = diversity
        self.extra_metrics = metrics or []
        self._metrics: list[SampleMetric] | None = None
        self.report: Report | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings of the sampler before anything is loaded; name the loop counts that validation leaves out.

        Raises:
            ValueError: a setting has a wrong value, or, in test, a state is to be carried that the network
                does not have.
            UserError: a loop is to end by itself, and nothing says when.
        """
        if stage == "predict":  # which measures nothing
            return
        draws = stage != "test" and self.num_validation_samples > 1
        self._settings(cast(ELTModule, pl_module), swept=stage == "test", said=draws and trainer.is_global_zero)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how long the model was trained."""
        self._train_steps = checkpoint["global_step"]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Measure the losses of held-out samples."""
        self._log_losses("val", trainer, cast(ELTModule, pl_module), batch)

    def _log_losses(self, stage: str, trainer: Trainer, module: ELTModule, batch: Batch) -> None:
        with trainer.precision_plugin.forward_context():
            losses = module.held_out_losses(batch, self._loops(module))
        # Lightning weighs ranks by the mean of their counts, cut to a whole number: as a multiple it stays exact.
        count = len(batch.x) * trainer.world_size
        named = {f"{stage}/loss@L{loops}": loss for loops, loss in losses.items()}
        module.log_dict(named, batch_size=count, sync_dist=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score a few samples at each loop count, and log them; before training as few as possible."""
        if self.num_validation_samples < 2:
            return
        module = cast(ELTModule, pl_module)
        num_samples = max(2, trainer.world_size) if trainer.sanity_checking else self.num_validation_samples
        sweep = self._sweep(trainer, min(num_samples, self.num_validation_samples), repeats=1)
        rows = self._run_sweep(trainer, module, sweep, self._settings(module, swept=False))
        for row in rows:
            # Every rank has the merged value already; sync_dist only says so to Lightning.
            pl_module.log_dict({f"val/{name}@L{row.loops}": row.mean(name) for name in row.metrics}, sync_dist=True)
        if trainer.is_global_zero and not trainer.sanity_checking:
            picture = torch.cat([picture_row(pictures) for pictures in labelled_pictures(rows).values()])
            log_picture(trainer, "val/samples", picture)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what long work takes, and make the metrics ready for the reconstructions.

        Without a checkpoint there is no model to measure.
        """
        self._has_model = trainer.ckpt_path is not None
        if self._has_model:
            module = cast(ELTModule, pl_module)
            loops, settings = self._loops(module), self._settings(module, swept=True)
            of_each = self.num_samples * self.repeats // trainer.world_size
            held_out = int(sum(trainer.num_test_batches)) * data_of(trainer).share_batch(trainer.world_size)[0]
            macs = of_each * sum(module.macs_per_sample(count, sampler) for count, sampler in settings)
            macs += held_out * module.network.macs(max(loops), loops)
            with trainer.precision_plugin.forward_context():
                announce("test", macs, module, settings[0][1], min(self.batch_size, self.num_samples))
        if self.reconstruction:
            for metric in self._metrics_on(trainer, pl_module.device):
                metric.reset()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Measure the losses of held-out samples; decode their codes, and score what comes out."""
        if self._has_model:
            self._log_losses("test", trainer, cast(ELTModule, pl_module), batch)
        if self.reconstruction:
            pixels = data_of(trainer).tokenizer.to(pl_module.device).decode(batch.x)
            for metric in self._metrics_on(trainer, pl_module.device):
                metric.update(pixels.to(metric.device), batch.labels.to(metric.device))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the sweep, print its table and write its files."""
        module = cast(ELTModule, pl_module)
        folder = run_folder(trainer)
        reconstruction: dict[str, float] = {}
        if self.reconstruction:
            for metric in self._metrics_on(trainer, module.device):
                reconstruction |= {name: float(value) for name, value in metric.compute().items()}
            if trainer.is_global_zero:
                write_reconstruction(folder, reconstruction)
        if not self._has_model:
            return
        sweep = self._sweep(trainer, self.num_samples, self.repeats)
        settings = self._settings(module, swept=True, said=trainer.is_global_zero)
        rows = self._run_sweep(trainer, module, sweep, settings, folder)
        if data_of(trainer).primary_metric == VAL_LOSS:
            for row in rows:
                row.metrics[VAL_LOSS] = [float(trainer.callback_metrics[f"test/loss@L{row.loops}"])]
        self.report = self._report(trainer, module, rows)
        if trainer.is_global_zero:
            self.report.write(folder)
            lines = self.report.lines()
            log_table(trainer, "test/loops", list(lines[0]), [list(line.values()) for line in lines])
            Console(width=None if Console().is_terminal else 140).print(self.report.table())
            names = ("loops.gif", "loops.png", "loops_spent.png", "pareto.png", "loops.csv", "loops.json")
            print("\n".join(str(folder / name) for name in names if (folder / name).exists()))
            if self.nearest:
                best = self.report.best(rows)
                pictures = best.pictures.to(with_float64(module.device))
                write_nearest(folder, best.loops, pictures, data_of(trainer), self.batch_size)

    def _run_sweep(
        self,
        trainer: Trainer,
        module: ELTModule,
        sweep: Sweep,
        settings: list[tuple[int, Sampler]],
        folder: Path | None = None,
    ) -> list[Row]:
        """Measure every loop count with every sampler, show how far that is, and end between batches if asked to.

        Args:
            trainer: that runs it.
            module: in eval mode, on its device.
            sweep: how each is measured.
            settings: loop counts and samplers.
            folder: where samples are saved, if any are; None to save none.
        """
        costs = [module.macs_per_sample(loops, sampler) for loops, sampler in settings]
        of_each, drawn = sweep.num_samples * sweep.repeats, 0
        rows: list[Row] = []

        def after_batch(count: int) -> None:
            nonlocal drawn
            place = len(rows)
            loops, sampler = settings[place]
            drawn = min(drawn + count, (place + 1) * of_each)
            share = (sum(costs[:place]) + costs[place] * (drawn / of_each - place)) / sum(costs)
            shown.show(drawn, lambda: in_words(loops, sampler.settings()), share)
            end_if_asked(trainer, module)

        with meter(trainer, of_each * len(settings), "sample") as shown:
            for loops, sampler in settings:
                archive = self._archive(trainer, folder, loops, sampler) if folder and self.save_samples else None
                rows.append(self._measure(trainer, module, sweep, loops, sampler, after_batch, archive))
                if archive is not None:
                    trainer.strategy.barrier()
                    if trainer.is_global_zero:
                        archive.finish()
                        print(archive.path)
        return rows

    def _settings(self, module: ELTModule, swept: bool, said: bool = False) -> list[tuple[int, Sampler]]:
        """List what is measured: loop counts with samplers; ``swept`` in test, otherwise with the module's own."""
        loops = self._loops(module)
        settings, left_out = swept_settings(
            loops, module.sampler, self.swept if swept else {}, module.network.has_recall
        )
        for _, sampler in settings:
            module.loop_count("auto" if self.loops == "auto" else None, sampler)
        for line in left_out if said else ():
            print(line)
        return settings

    def _archive(self, trainer: Trainer, folder: Path, loops: int, sampler: Sampler) -> SampleArchive:
        asked = folder / str(self.save_samples)
        name = f"{asked.stem}_L{loops}"
        for setting, value in sampler.settings().items():
            if len(self.swept[setting] or ()) > 1 and setting == "carry_state":
                name += "_carried" if value else "_from_zero"
            elif len(self.swept[setting] or ()) > 1 and value is not None:
                name += f"_{setting}{value if isinstance(value, str) else format(value, 'g')}"
        return SampleArchive(asked.with_name(f"{name}.npz"), trainer.global_rank, trainer.world_size)

    def _loops(self, module: ELTModule) -> list[int]:
        return loops_to_measure(self.loops, module.max_loops)

    def _sweep(self, trainer: Trainer, num_samples: int, repeats: int) -> Sweep:
        rank, world_size = trainer.global_rank, trainer.world_size
        return Sweep(num_samples, self.batch_size, self.seed, repeats, self.num_pictures, rank, world_size)

    def _measure(
        self,
        trainer: Trainer,
        module: ELTModule,
        sweep: Sweep,
        loops: int,
        sampler: Sampler,
        progress: Callable[[int], None],
        archive: SampleArchive | None,
    ) -> Row:
        def precision() -> AbstractContextManager[Any]:
            return trainer.precision_plugin.forward_context()

        tokenizer = data_of(trainer).tokenizer.to(module.device)
        metrics = self._metrics_on(trainer, module.device)
        request = data_of(trainer).request
        return sweep.run(module, sampler, tokenizer, metrics, loops, request, precision, progress, archive)

    def _metrics_on(self, trainer: Trainer, device: torch.device) -> list[SampleMetric]:
        """Build the metrics once; their reference statistics serve every loop count and every validation."""
        if self._metrics is None:
            self._metrics = [*data_of(trainer).build_metrics(), *self.extra_metrics]
            if self.diversity and trainer.testing:
                further = [more for metric in self._metrics for more in metric.diversity()]
                if not further:
                    raise UserError("--diversity needs the features of real pictures, which these data do not give")
                self._metrics += further
        return [metric.to(with_float64(device)) for metric in self._metrics]

    def _report(self, trainer: Trainer, module: ELTModule, rows: list[Row]) -> Report:
        data = data_of(trainer)
        params_backbone, params_total = module.num_parameters()
        backbone = module.network.backbone
        networks = [metric.feature_network for metric in self._metrics or [] if metric.feature_network]
        return Report(
            rows=rows,
            primary_metric=scored_as(data.primary_metric, list(rows[0].metrics)),
            higher_is_better=data.higher_is_better,
            feature_network=", ".join(networks) or None,
            num_samples=self.num_samples,
            seed=self.seed,
            train_loops=module.max_loops,
            train_mode=module.distillation.mode,
            train_steps=self._train_steps,
            sampling_steps=rows[0].settings["steps"],
            recall=module.network.has_recall,
            weights="ema" if any(callback.is_judged for callback in callbacks_of(trainer, EMA)) else "raw",
            params_backbone=params_backbone,
            params_total=params_total,
            effective_depth={row.loops: backbone.effective_depth(row.loops) for row in rows},
            class_names=data.class_names,
        )


def loops_to_measure(loops: Sequence[int] | Literal["auto"] | None, max_loops: int) -> list[int]:
    """List the loop counts that are measured: those asked for, or 1 … L_max where these are not too many to want.

    With "auto" it is the most that a loop may run which ends by itself.

    Raises:
        UserError: they are.
    """
    if loops is None and max_loops > MOST_UNASKED:
        raise UserError(
            f"every loop count up to {max_loops} would be measured: say which, as in --loop_metrics.loops=1,{max_loops}"
        )
    if loops == "auto":
        return [AUTO_LOOPS * max_loops]
    return sorted(set(range(1, max_loops + 1) if loops is None else loops))

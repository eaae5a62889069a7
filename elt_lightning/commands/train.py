"""`elt fit`, `validate`, `test` and `predict`: LightningCLI with this project's links, run folders and messages."""

import importlib
import logging
import os
import pkgutil
import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from elt_lightning import data, networks, objectives, processes, samplers
from elt_lightning.checkpoints.initial import begin_from
from elt_lightning.checkpoints.pretrained import from_pretrained, is_exported, read_as_checkpoint
from elt_lightning.checkpoints.recording import Recipe
from elt_lightning.commands.planning import MOST_REHEARSED, rehearse
from elt_lightning.commands.refusals import abstract_class, explain
from elt_lightning.commands.settings import (
    FROM_DATA,
    LINKED,
    SHORT_FLAGS,
    find_section,
    prepared,
    trains_tokenizer,
)
from elt_lightning.data.base import BatchedDataModule, GenerativeDataModule
from elt_lightning.errors import UserError, check_memory, check_most
from elt_lightning.evaluation.loop_metrics import LoopMetrics
from elt_lightning.evaluation.sample_writer import SampleWriter
from elt_lightning.files import next_numbered, write_text
from elt_lightning.model import ELTModel
from elt_lightning.tokenizers.vq_training import VQTraining
from elt_lightning.training.announce import announce
from elt_lightning.training.charts import Charts
from elt_lightning.training.checkpointing import Checkpoint
from elt_lightning.training.ema import EMA
from elt_lightning.training.loop_monitor import LoopMonitor
from elt_lightning.training.module import ELTModule
from elt_lightning.training.precision import PRECISIONS, cache_weight_casts
from elt_lightning.training.preemption import Preemption, saved_checkpoint
from elt_lightning.training.progress import Progress, ValidationScores
from elt_lightning.training.runs import LOCK, choose_run_dir, locked
from elt_lightning.training.skip_non_finite_steps import SkipNonFiniteSteps
from elt_lightning.training.strategies import check_strategy, supported_strategy
from elt_lightning.training.throughput import Throughput
from elt_lightning.training.trainer_settings import check_trainer_settings, count_in_steps, watch_monitored

BATCHES = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
"""What each command's batches are called in the setting that limits them; with 0 Lightning runs and does nothing."""


def run(name: str, arguments: list[str]) -> None:
    """Run one of the trainer's commands (UserError: the command line, the config or a file is wrong)."""
    quieten_libraries()
    if "-h" in arguments or "--help" in arguments:
        print("short flags:", *(f"  {short} for {full}" for short, full in SHORT_FLAGS[name].items()), sep="\n")
        print("  --plan for the best setting of a plan of elt calibrate\n" if name in ("test", "predict") else "")
        ELTCommandLine.for_arguments([name, "--help"])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = prepared(name, arguments, Path(scratch))
            command = TokenizerCommandLine if trains_tokenizer(arguments) else ELTCommandLine
            command.for_arguments([name, *arguments])
    except ArgumentError as error:
        raise UserError(explain(str(error))) from error
    except (MisconfigurationException, SafetensorError, ValueError) as error:
        raise UserError(str(error) or type(error).__name__) from error
    except torch.OutOfMemoryError as error:
        what = (
            "--loop_metrics.batch_size or --samples.batch_size"
            if name in ("test", "predict")
            else (
                "--data.init_args.micro_batch_size, which leaves the global batch as it is, or set "
                "--model.network.init_args.activation_checkpointing=true; where it happened in validation, lower "
                "--loop_metrics.batch_size"
            )
        )
        raise UserError(f"the device ran out of memory: lower {what} ({str(error).splitlines()[0]})") from error


def import_classes() -> None:
    """Import all that a config may name, so that the name of a class is enough, without its module."""
    for package in (data, networks, objectives, processes, samplers):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


SAYS_NOTHING = (
    "💡 Tip",
    "TPU available",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_",
    "Restored all states from",
    "Loaded model weights from",
)
"""How those lines of Lightning's log begin that advertise, or repeat this program's own."""


def quieten_libraries() -> None:
    """Leave out what the libraries print that tells a user of this program nothing."""
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*The dirpath has changed.*",
        ".*barrier.*device_id.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*Be aware that when using `ckpt_path`, callbacks.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",
        r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen ones are meant to be
        "The number of training batches .* is smaller than the logging interval",  # steps are counted over epochs
        "Checkpoint directory .* exists and is not empty",  # true of every resumed training
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(SAYS_NOTHING)
    )


class EventLogger(TensorBoardLogger):
    """TensorBoard's events, without the ``hparams.yaml`` that Lightning lays beside them: ours would be empty."""

    @rank_zero_only
    def save(self) -> None:
        """Write out the events."""
        self.experiment.flush()


class RunCommandLine(LightningCLI):
    """LightningCLI with what every run of this project has: a run folder, its config, progress, errors of one line."""

    model_class: type[LightningModule]
    datamodule_class: type[BatchedDataModule]
    names_model_class: bool
    """Whether a config's ``model`` section names a class, or holds the settings of ``model_class`` itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import_classes()
        self.command: str = kwargs["args"][0]
        with ExitStack() as self.held:  # Lightning's constructor does everything, to the end of the command
            super().__init__(*args, **kwargs)

    @classmethod
    def for_arguments(cls, arguments: list[str]) -> "RunCommandLine":
        """Parse the arguments, build everything and run the command."""
        return cls(
            cls.model_class,
            cls.datamodule_class,
            subclass_mode_model=cls.names_model_class,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": "elt"}
            | {arguments[0]: {"exit_on_error": False, "allow_abbrev": False}},
            trainer_defaults={
                "max_epochs": -1,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 20,
                "enable_model_summary": False,  # a line of this program's own says how large the model is
            },
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one command that was called: a parser for each of the others would cost as much again."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what :func:`run` prepared; Lightning's own version warns when ``sys.argv`` is not what it is given."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(explain(str(error), known=self._parser(self.command).get_defaults().keys())) from error
        config = self.config[self.command]
        for name, default in vars(self._parser(self.command).get_defaults()).items():
            if isinstance(default, Namespace) and not isinstance(config[name], Namespace):
                raise UserError(f"{name}: expected a section of settings, not {config[name]}")
        for target, source in LINKED.items():
            if source == "the data" and config.get(target) is not None:
                raise UserError(f"{target} is decided by {source}: leave it out")
        seed = self.config[self.config.subcommand].seed_everything
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise UserError(f"seed_everything must be a whole number in [0, 2^31), not {seed}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder, checkpoints, what is done about steps that are not finite, and the one seed."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="folder of this run; a new one by default")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(SkipNonFiniteSteps, "skip_non_finite_steps")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed" if self.names_model_class else "model.seed")

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder, and put there what the trainer writes."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.trainer.max_steps < 0 and config.trainer.max_epochs == -1:
            raise UserError("say how long to train: --trainer.max_steps N or --trainer.max_epochs N")
        if self.subcommand == "fit":
            check_trainer_settings(config.trainer)
        limit = f"limit_{BATCHES[str(self.subcommand)]}_batches"
        if config.trainer[limit] == 0:
            raise UserError(f"{limit} is 0: elt {self.subcommand} would have nothing to do")
        if str(config.trainer.devices).isdecimal():
            check_most(devices=int(config.trainer.devices))
        config.trainer.strategy = supported_strategy(config.trainer.strategy)
        self.run_dir = choose_run_dir(config, str(self.subcommand))
        self.held.enter_context(locked(self.run_dir))

    def instantiate_classes(self) -> None:
        """Build data module, model and trainer (UserError: a class refused its settings)."""
        try:
            super().instantiate_classes()
            check_strategy(self.trainer.strategy, self.model, self.config[self.subcommand].ckpt_path)
            if self.subcommand == "fit":
                count_in_steps(self.trainer, self.datamodule.share_batch(self.trainer.world_size)[1])
                watch_monitored(self.trainer)
        except Exception as error:
            with suppress(OSError):
                if os.listdir(self.run_dir) == [LOCK]:  # the folder was made for this run
                    (self.run_dir / LOCK).unlink()
                    self.run_dir.rmdir()
            if isinstance(error, UserError | ArgumentError | OSError | torch.OutOfMemoryError):
                raise
            # A class refused its settings, or broke on them: which of the two, its author alone knows.
            if isinstance(error, ValueError | MisconfigurationException):
                raise UserError(explain(str(error))) from error
            if abstract := re.match(r"Can't instantiate abstract class (\w+)", str(error)):
                raise UserError(abstract_class(abstract.group(1))) from error
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"a class broke on its settings ({reason}); --debug shows where") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with its logger, its progress display and the callbacks that need the config."""
        config = self.config_init[self.subcommand]
        logger = config.trainer.logger
        if logger in (None, True):
            # An empty name and version: TensorBoard's files lie in the run's folder itself.
            kwargs["logger"] = EventLogger(str(self.run_dir), name="", version="")
        settings = self.resolved_config()
        charts = Charts({name: settings[name] for name in ("model", "data", "trainer")})
        callbacks = [*self.own_callbacks(), ValidationScores(), charts]
        asked = config.trainer.callbacks
        if not any(isinstance(callback, ProgressBar) for callback in (asked if isinstance(asked, list) else [asked])):
            if config.trainer.enable_progress_bar is not False:
                callbacks.append(Progress())
            kwargs["enable_progress_bar"] = False  # that is Lightning's
        callbacks.append(Preemption())  # last: the checkpoint it saves must hold all that a step changed
        self.trainer_defaults = self.trainer_defaults | {"callbacks": callbacks}
        kwargs["default_root_dir"] = str(self.run_dir)
        trainer = super().instantiate_trainer(**kwargs)
        cache_weight_casts(trainer)
        checkpoint = self.config[self.subcommand].ckpt_path
        if checkpoint is not None and is_exported(checkpoint):
            trainer.strategy.load_checkpoint = read_as_checkpoint  # type: ignore[method-assign, assignment]
        return trainer

    def own_callbacks(self) -> list[Callback]:
        """Return the callbacks that have no settings: one puts the recipe into checkpoints."""
        return [Recipe(*self.recipe(), self.datamodule.tokenizer_description)]

    def recipe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the resolved ``model`` and ``data`` sections as plain data."""
        resolved = self.resolved_config()
        return resolved["model"], resolved["data"]

    def resolved_config(self) -> dict[str, Any]:
        """Return every setting of this command after defaults, configs and flags, as plain data."""
        parser = self._parser(self.subcommand)
        text = parser.dump(self.config[self.subcommand], skip_unset=False, skip_link_targets=False)
        return yaml.safe_load(text)

    def after_instantiate_classes(self) -> None:
        """Write the resolved config into the run's folder before anything is computed."""
        if not self.trainer.is_global_zero:
            return
        path = self.run_dir / "config.yaml"
        if path.exists():
            path = next_numbered(self.run_dir, f"config_{self.subcommand}").with_suffix(".yaml")
        write_text(path, yaml.safe_dump(self.resolved_config(), sort_keys=False))
        print(f"{self.subcommand}: {self.run_dir}", flush=True)
        if self.subcommand == "fit":
            print(sizes(self.model), flush=True)

    def after_fit(self) -> None:
        """Print where the model is, and what to do with it."""
        if not (self.trainer.is_global_zero and self.trainer.state.finished):
            return
        step, path = self.trainer.global_step, saved_checkpoint(self.trainer)
        steps, started_from = f"{step} {'step' if step == 1 else 'steps'}", self.config[self.subcommand].ckpt_path
        if path is not None:
            print(f"trained {steps}: {path}")
        elif started_from is not None and isinstance(self.trainer.checkpoint_callback, Checkpoint):
            path = started_from  # what this program saves at the end of any training
            print(f"nothing was left to train: {path} has {steps}")
        else:
            print(f"trained {steps}, and wrote no checkpoint, as it was told")
        if path is not None:
            print(f"next: {self.next_command(Path(path))}")

    def next_command(self, checkpoint: Path) -> str:
        """Return the command to run after a finished training."""
        raise NotImplementedError


class ELTCommandLine(RunCommandLine):
    """Trains and measures :class:`ELTModule`: links from data to model, and the callbacks of such runs."""

    model_class = ELTModule
    datamodule_class = GenerativeDataModule
    names_model_class = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that have settings, and the links."""
        super().add_arguments_to_parser(parser)
        if self.command == "fit":
            line = "model folder or checkpoint to begin from: its settings, which configs and flags change, its weights"
            parser.add_argument("--init_from", type=str | None, default=None, help=line)
        parser.add_lightning_class_args(LoopMetrics, "loop_metrics")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(SampleWriter, "samples")
        for source, targets in FROM_DATA.items():
            for target in targets:
                parser.link_arguments(f"data.{source}", target, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Ask for a checkpoint where one is needed; settle the run's folder."""
        config = self.config[self.subcommand]
        measures_tokenizer = self.subcommand == "test" and config.loop_metrics.reconstruction
        if self.subcommand != "fit" and config.ckpt_path is None and not measures_tokenizer:
            raise UserError(f"elt {self.subcommand} needs a trained model: --ckpt_path PATH")
        super().before_instantiate_classes()
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written as they come, not kept in memory
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # scores are printed by this program

    def own_callbacks(self) -> list[Callback]:
        """Measure speed, and what loops do, too."""
        return [Throughput(), LoopMonitor(), *super().own_callbacks()]

    def before_fit(self) -> None:
        """Load what training begins from; refuse loops that the device cannot hold; say what many take."""
        config = self.config[self.subcommand]
        if config.init_from is not None:
            line = begin_from(self.model, config.init_from)
            if self.trainer.is_global_zero:
                print(line, flush=True)
        teacher = self.model.outer_teacher
        if teacher is not None:
            teach(self.model, teacher.path, from_pretrained)
            if self.trainer.is_global_zero:
                print(f"outer teacher: {teacher.path}, weight {teacher.weight:g}", flush=True)
        types = PRECISIONS.get(str(self.trainer.precision))
        if self.model.max_loops > MOST_REHEARSED and types is not None:
            kept, network = rehearse(self.model, types), self.model.network
            of_each = kept.recomputing if network.backbone.activation_checkpointing else kept.per_sample
            samples = self.datamodule.share_batch(self.trainer.world_size)[0]
            device = self.trainer.strategy.root_device
            is_gpu = device.type == "cuda"
            what, memory = f"a pass of {samples} samples at max_loops {self.model.max_loops}", samples * of_each
            check_memory(what, memory, torch.cuda.get_device_properties(device).total_memory if is_gpu else None)
            exits = self.model.distillation.student_exits(self.model.seed, 0)
            macs = 3 * samples * network.macs(self.model.max_loops, exits)  # forward, and twice as much backward
            announce(f"{what}, {memory / 2**30:,.1f} GiB", macs, self.model, self.model.sampler, samples)

    def recipe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return both sections, with what is linked from the data filled in."""
        model, data = super().recipe()
        for source, targets in FROM_DATA.items():
            value = getattr(self.datamodule, source)
            for target in targets:
                section, last = find_section({"model": model}, target)
                if section is not None:
                    section[last] = list(value) if isinstance(value, tuple) else value
        return model, data

    def next_command(self, checkpoint: Path) -> str:  # noqa: D102
        return f"elt test --ckpt_path {checkpoint}"


class TokenizerCommandLine(RunCommandLine):
    """Trains a tokenizer: :class:`VQTraining` on clips or pictures themselves."""

    model_class = VQTraining
    datamodule_class = BatchedDataModule
    names_model_class = True

    def before_instantiate_classes(self) -> None:
        """Offer training alone; `elt test --reconstruction` measures a tokenizer on what it encoded."""
        if self.subcommand != "fit":
            raise UserError(f"elt {self.subcommand} is not for tokenizers: elt fit trains one, elt encode uses it")
        if str(self.config.fit.trainer.precision) in ("bf16-true", "16-true", "bf16", "16"):
            raise UserError(
                "the average of a tokenizer needs weights in float32: --trainer.precision=bf16-mixed has them"
            )
        super().before_instantiate_classes()

    def next_command(self, checkpoint: Path) -> str:  # noqa: D102
        return f"elt encode, with --tokenizer_path {self.run_dir / 'tokenizer.safetensors'}"


def teach(module: ELTModule, path: str, read: Callable[[str], ELTModel]) -> None:
    """Let a module learn from its outer teacher (UserError: that cannot be read, or does not go with the module)."""
    try:
        module.learn_from(read(path))
    except UserError as error:
        flag = "--model.outer_teacher"
        raise UserError(f"{flag}.path {path}: {error}; name another, or none by {flag}=null") from error


def sizes(model: LightningModule) -> str:
    """Return how many parameters each part of a model has, and which parts are not trained."""
    parts = []
    for name, part in model.named_children():
        parameters = list(part.parameters())
        if parameters:
            frozen = "" if any(parameter.requires_grad for parameter in parameters) else " (frozen)"
            parts.append(f"{name} {sum(parameter.numel() for parameter in parameters):,}{frozen}")
    return f"parameters: {', '.join(parts)}"

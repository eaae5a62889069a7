"""What the parser refuses: one line with the key, the value and what it may be, the same of a flag and of YAML."""

from pathlib import Path

import pytest
import yaml

from elt_lightning.cli import main
from elt_lightning.commands.refusals import explain

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

LOGGER = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}
STOPPING = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}

REFUSED: dict[str, tuple[str, object, str]] = {
    "data, key": ("data.init_args.batchsize", 3, "data: LatinSquaresDataModule has no setting batchsize: did you mean"),
    "data, type": ("data.init_args.batch_size", "three", "batch_size: expected a whole number, not three"),
    "data, range": (
        "data.init_args.batch_size",
        0,
        "batch sizes must be at least 1 and num_workers at least 0, not 0, 0",
    ),
    "data, class": ("data.class_path", "LatinSquares", "class 'LatinSquares': did you mean LatinSquaresDataModule?"),
    "model, key": (
        "model.lops",
        3,
        "there is no setting model.lops: there are network, process, objective, distillation",
    ),
    "model, type": ("model.class_dropout_prob", "much", "model.class_dropout_prob: expected a number, not much"),
    "model, range": ("model.class_dropout_prob", 2, "class_dropout_prob must lie in [0, 1], not 2"),
    "network, key": (
        "model.network.init_args.widht",
        3,
        "LoopedMaskedTransformer has no setting widht: did you mean",
    ),
    "network, type": ("model.network.init_args.width", "x", "width: expected a whole number or null, not x"),
    "network, class": ("model.network.class_path", "torch.nn.Lin", "no class 'Lin'"),
    "distillation": ("model.distillation.max_loops", "many", "max_loops: expected a whole number, not many"),
    "objective, key": ("model.objective.init_args.smoothing", 1, "setting smoothing: did you mean label_smoothing?"),
    "objective, type": ("model.objective.init_args.label_smoothing", "x", "label_smoothing: expected a number, not x"),
    "objective, range": ("model.objective.init_args.label_smoothing", 2, "label_smoothing"),
    "sampler, key": ("model.sampler.init_args.stpes", 3, "MaskGITSampler has no setting stpes: did you mean steps?"),
    "sampler, choice": (
        "model.sampler.init_args.guidance.schedule",
        "cubic",
        "guidance.schedule: expected one of constant, linear, power_cosine, not cubic",
    ),
    "sampler, range": (
        "model.sampler.init_args.guidance.scale",
        -1.0,
        "needs scale >= 0 and power > 0, not scale -1",
    ),
    "optimiser, key": ("model.optimizer.init_args.rate", 3, "AdamW has no setting rate: there are params, lr, betas"),
    "optimiser, type": ("model.optimizer.init_args.lr", "fast", "optimizer.init_args.lr: expected a number, not fast"),
    "optimiser, pair": ("model.optimizer.init_args.betas", 0.9, "init_args.betas: expected a list, not 0.9"),
    "schedule": ("model.learning_rate_schedule.decay", "x", "decay: expected one of constant, cosine, not x"),
    "logger, key": ("trainer.logger.init_args.foo", 1, "CSVLogger has no setting foo: there are save_dir, name"),
    "logger, type": (
        "trainer.logger.init_args.flush_logs_every_n_steps",
        "often",
        "trainer.logger.init_args.flush_logs_every_n_steps: expected a whole number, not often",
    ),
    "trainer, key": ("trainer.max_step", 3, "there is no setting trainer.max_step: did you mean trainer.max_steps?"),
    "trainer, type": ("trainer.max_steps", "ten", "trainer.max_steps: expected a whole number, not ten"),
    "trainer, choice": ("trainer.precision", 7, "bf16-mixed"),
    "average": ("ema.decay", "slow", "ema.decay: expected a number, not slow"),
    "measurements": (
        "loop_metrics.loops",
        "[all]",
        "loop_metrics.loops: expected a whole number or one of auto or null, not all",
    ),
    "a section of no program": ("modle.seed", 3, "there is no setting modle.seed: there are"),
    "a section that is a number": ("ema", 3, "ema: expected a section of settings, not 3"),
    "what the data decide": ("model.num_classes", 3, "model.num_classes is decided by the data: leave it out"),
    "what the data decide of a class": (
        "model.network.init_args.codebook_size",
        3,
        "codebook_size is decided by the data",
    ),
    "a seed of its own": ("data.init_args.seed", 3, "data.init_args.seed is decided by seed_everything: leave it out"),
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["fit", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("elt: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("elt: error: ")


@pytest.fixture
def config(latin_squares_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of which one thing is to be spoiled, in the current folder; its data are there."""
    content = yaml.safe_load(QUICKSTART.read_text())
    content["data"]["init_args"] |= {"root": str(latin_squares_root), "num_train": 64, "num_val": 8}
    content["trainer"] |= {"logger": LOGGER, "callbacks": [STOPPING], "accelerator": "cpu"}
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_and_yaml_are_refused_alike(name: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In YAML all; as flags one of each section, for the sake of time."""
    key, value, telling = REFUSED[name]
    content: object = yaml.safe_load(value) if isinstance(value, str) else value
    for part in reversed(key.split(".")):
        content = {part: content}
    config.with_name("spoiled.yaml").write_text(yaml.safe_dump({"base": config.name, **content}))  # type: ignore[dict-item]
    said = refusal(["--config=spoiled.yaml"], capsys)
    assert telling in said
    if any(word in name for word in ("type", "decide", "seed")):
        assert refusal([f"--config={config.name}", f"--{key}={value}"], capsys) == said


CALLBACKS: dict[str, tuple[dict[str, object], str]] = {
    "key": ({"monitor": "x", "patients": 3}, "trainer.callbacks: EarlyStopping has no setting patients: did you mean"),
    "type": (
        {"monitor": "x", "patience": "lots"},
        "trainer.callbacks.init_args.patience: expected a whole number",
    ),
    "range": ({"monitor": "x", "mode": "most"}, "`mode` can be min, max, got most"),
    "nothing": ({}, "trainer.callbacks: EarlyStopping needs a value for monitor"),
}


@pytest.mark.parametrize("case", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks(case: tuple[dict[str, object], str], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, telling = case
    callbacks = [{"class_path": "LearningRateMonitor"}, {"class_path": "EarlyStopping", "init_args": settings}]
    spoiled = {"base": config.name, "trainer": {"callbacks": callbacks}}
    config.with_name("spoiled.yaml").write_text(yaml.safe_dump(spoiled))
    assert telling in refusal(["--config=spoiled.yaml"], capsys)


def test_the_optimisers_range(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch meets its settings when training begins."""
    said = refusal(["--config=config.yaml", "--model.optimizer.init_args.lr=-1.0", "--run_dir=new"], capsys)
    assert "model.optimizer" in said
    assert "Invalid learning rate: -1.0" in said


def test_the_name_of_a_class_is_enough(latin_squares_root: Path, tmp_path: Path) -> None:
    """Of every part of a config; the run records where each is from."""
    content = f"""
data: {{class_path: LatinSquaresDataModule, init_args: {{root: {latin_squares_root}, batch_size: 8, num_train: 64,
  num_val: 8}}}}
model:
  network: {{class_path: LoopedMaskedTransformer, init_args: {{num_layers: 1, width: 16, num_heads: 2}}}}
  process: MaskingProcess
  objective: MaskedObjective
  distillation: {{max_loops: 2}}
  sampler: {{class_path: MaskGITSampler, init_args: {{steps: 2}}}}
  optimizer: {{class_path: AdamW, init_args: {{lr: 1e-3}}}}
trainer: {{max_steps: 1, accelerator: cpu, logger: {{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}},
  callbacks: [LearningRateMonitor], limit_val_batches: 0}}
"""
    (tmp_path / "short.yaml").write_text(content)
    assert main(["fit", f"--config={tmp_path / 'short.yaml'}", f"--run_dir={tmp_path / 'run'}"]) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert recorded["network"]["class_path"] == "elt_lightning.networks.masked.LoopedMaskedTransformer"
    assert recorded["sampler"]["class_path"] == "elt_lightning.samplers.masked.MaskGITSampler"


def test_what_no_tree_was_made_of_is_told_whole() -> None:
    assert explain("two\n  lines") == "two lines"

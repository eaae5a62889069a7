"""A long training at a tiny size: neither memory nor open files grow.

`ELT_SOAK_STEPS=2000` makes it as long as a soak should be; without it, it is short enough for every run of the tests.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import SMALL

from elt_lightning.cli import main
from elt_lightning.commands.train import RunCommandLine

STEPS = int(os.environ.get("ELT_SOAK_STEPS", "300"))
DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
WARM_UP = 0.4
"""Share of the steps after which memory is looked at: allocators and caches grow at first."""
BYTES_PER_STEP = 16_000
"""What memory may grow by; a batch that were kept, with the graph of its loss, is several times that."""


class Watch(Callback):
    """Measures this process after every step: resident memory in bytes, and open files."""

    def __init__(self, leak: bool = False) -> None:
        self.memory: list[int] = []
        self.files: list[int] = []
        self.leak: list[Any] | None = [] if leak else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(os.listdir("/proc/self/fd")))
        if self.leak is not None:
            self.leak.append(torch.ones(500_000))  # more than other tests may have left free in this process

    def growth(self) -> float:
        """Bytes per step after warming up: the slope of a line through what was measured."""
        measured = torch.tensor(self.memory[int(len(self.memory) * WARM_UP) :], dtype=torch.float64)
        steps = torch.arange(len(measured), dtype=torch.float64)
        steps -= steps.mean()
        return float((steps * (measured - measured.mean())).sum() / (steps**2).sum())


def train(watch: Watch, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made_before = RunCommandLine.instantiate_trainer

    def instantiate_trainer(self: RunCommandLine, **settings: Any) -> Trainer:
        trainer = made_before(self, **settings)
        listed: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        listed.insert(next(i for i, callback in enumerate(listed) if isinstance(callback, ModelCheckpoint)), watch)
        return trainer

    monkeypatch.setattr(RunCommandLine, "instantiate_trainer", instantiate_trainer)
    flags = ["--config", str(DIGITS), *SMALL, "--trainer.accelerator=cpu", f"--trainer.max_steps={steps}"]
    flags += ["--trainer.val_check_interval=25", "--checkpoint.every_n_train_steps=10"]
    assert main(["fit", *flags, "--run_dir=run"]) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux counts")
def test_a_long_training_keeps_memory_and_open_files_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watch = Watch()
    train(watch, STEPS, monkeypatch)
    settled = watch.files[int(STEPS * WARM_UP) :]
    print(f"{STEPS} steps: {watch.growth():.0f} bytes per step, {min(settled)} to {max(settled)} open files")
    assert watch.growth() < BYTES_PER_STEP
    assert settled[-1] <= settled[0]
    assert max(settled) - min(settled) <= 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux counts")
def test_a_leak_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred kilobytes a step."""
    monkeypatch.chdir(tmp_path)
    watch = Watch(leak=True)
    train(watch, 100, monkeypatch)
    assert watch.growth() > BYTES_PER_STEP

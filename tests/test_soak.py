"""A long training at a tiny size: neither memory nor open files grow.

Each training is measured in a process of its own, which this file is the program of: in a process that ran other tests,
memory that they left free would hide a leak.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import SMALL

from elt_lightning.cli import main
from elt_lightning.commands.train import RunCommandLine

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
WARM_UP = 0.4
"""Share of the steps after which memory is looked at: allocators and caches grow at first."""
BYTES_PER_STEP = 4_000
"""What memory may grow by; a batch that were kept, with the graph of its loss, is many times that."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux counts"),
]


class Watch(Callback):
    """Measures this process after every step: resident memory in bytes, and open files.

    Args:
        leak: bytes that each step keeps.
    """

    def __init__(self, leak: int = 0) -> None:
        self.memory: list[int] = []
        self.files: list[int] = []
        self.leak, self.kept = leak, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.kept.append(torch.ones(self.leak, dtype=torch.uint8))

    def settled(self) -> dict[str, Any]:
        """Return bytes per step after warming up, the slope of a line through what was measured, and the open files."""
        first = int(len(self.memory) * WARM_UP)
        measured = torch.tensor(self.memory[first:], dtype=torch.float64)
        steps = torch.arange(len(measured), dtype=torch.float64)
        steps -= steps.mean()
        growth = float((steps * (measured - measured.mean())).sum() / (steps**2).sum())
        return {"steps": len(self.memory), "bytes_per_step": growth, "files": self.files[first:]}


def train(watch: Watch, steps: int) -> None:
    made_before = RunCommandLine.instantiate_trainer

    def instantiate_trainer(self: RunCommandLine, **settings: Any) -> Trainer:
        trainer = made_before(self, **settings)
        listed: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        listed.insert(next(i for i, callback in enumerate(listed) if isinstance(callback, ModelCheckpoint)), watch)
        return trainer

    RunCommandLine.instantiate_trainer = instantiate_trainer  # type: ignore[method-assign]
    flags = ["--config", str(DIGITS), *SMALL, "--trainer.accelerator=cpu", f"--trainer.max_steps={steps}"]
    flags += ["--trainer.val_check_interval=50", "--checkpoint.every_n_train_steps=25"]
    assert main(["fit", *flags, "--run_dir=run"]) == 0


def soak(folder: Path, steps: int, leak: int = 0) -> dict[str, Any]:
    """Train in a process of its own, on one thread, and give what it measured."""
    command = [sys.executable, __file__, str(steps), str(leak)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    assert measured["steps"] == steps
    return measured


def test_a_long_training_keeps_memory_and_open_files_flat(tmp_path: Path) -> None:
    """2,000 steps, validation every 50, a checkpoint every 25."""
    measured = soak(tmp_path, 2000)
    files = measured["files"]
    print(f"{measured['bytes_per_step']:.0f} bytes per step, {min(files)} to {max(files)} open files")
    assert measured["bytes_per_step"] < BYTES_PER_STEP
    assert files[-1] <= files[0]
    assert max(files) - min(files) <= 2


def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    """Of sixteen kilobytes a step: less than one batch with the graph of its loss."""
    assert soak(tmp_path, 400, leak=16_000)["bytes_per_step"] > BYTES_PER_STEP


if __name__ == "__main__":
    watching = Watch(int(sys.argv[2]))
    train(watching, int(sys.argv[1]))
    Path("measured.json").write_text(json.dumps(watching.settled()))

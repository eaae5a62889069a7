"""Golden values: training and sampling from the command line give what they gave before the code was last moved.

Protects seeds, losses and samples through refactorings; about 25 seconds. On the machine that wrote them they hold bit
for bit; other processors' kernels may round otherwise, hence the tolerance. After a change that means to alter them,
`python tests/test_golden.py` writes them anew, and the changelog says so.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import elt_lightning.processes.noise as noise
from elt_lightning import from_pretrained
from elt_lightning.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
GOLDEN = Path(__file__).parent / "golden.json"
NAMES = ("quickstart", "sudoku", "quickstart_diffusion")


def measure(name: str) -> dict[str, Any]:
    """Return weights after four steps of training, and six samples at one and three loops, in the current folder."""
    fit = [
        "--model.network.init_args.width=32",
        "--model.network.init_args.mlp_width=64",
        "--model.sampler.init_args.steps=3",
        "--data.init_args.batch_size=16",
        "--data.init_args.num_train=64",
        "--data.init_args.num_val=32",
        "--loop_metrics.num_validation_samples=0",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
        f"--run_dir={name}",
    ]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *fit]) == 0
    checkpoint = f"{name}/checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    raw, average = content["state_dict"], content["ema"]["weights"]
    module = from_pretrained(checkpoint)
    labels, seeds = torch.arange(6) % 3, noise.sample_seeds(7, torch.arange(6))
    samples = [module.sample(labels, loops, seeds).double() for loops in (1, 3)]
    return {
        "weights": sum(weight.double().abs().sum().item() for _, weight in sorted(raw.items())),
        "average": sum(weight.double().abs().sum().item() for _, weight in sorted(average.items())),
        "sums": [batch.flatten(1).sum(1).tolist() for batch in samples],
        "squares": [batch.flatten(1).square().sum(1).tolist() for batch in samples],
    }


@pytest.mark.parametrize("name", NAMES)
def test_training_and_sampling_give_the_golden_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    golden = json.loads(GOLDEN.read_text())[name]
    measured = measure(name)
    for key, value in golden.items():
        torch.testing.assert_close(torch.tensor(measured[key]), torch.tensor(value), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        values = {name: measure(name) for name in NAMES}
    (Path(sys.argv[1]) if sys.argv[1:] else GOLDEN).write_text(json.dumps(values, indent=1) + "\n")

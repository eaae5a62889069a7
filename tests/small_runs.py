"""What the tests of the commands share: settings of a few seconds, and a model trained with them."""

import os
from pathlib import Path

from elt_lightning.cli import main

SMALL = [
    "--model.network.init_args.width=16",
    "--model.network.init_args.num_heads=2",
    "--model.network.init_args.mlp_width=32",
    "--model.sampler.init_args.steps=3",
    "--loop_metrics.num_validation_samples=4",
    "--loop_metrics.num_samples=12",
    "--data.init_args.batch_size=16",
]
SMALL_SQUARES = [*SMALL, "--data.init_args.num_train=64", "--data.init_args.num_val=40"]


def train_small_squares(config: Path, home: Path) -> Path:
    """Train for six steps on Latin squares in the folder ``home``, and give the checkpoint."""
    before = Path.cwd()
    os.chdir(home)
    try:
        settings = ["--trainer.max_steps=6", "--trainer.val_check_interval=4", "--run_dir=runs/small"]
        assert main(["fit", "--config", str(config), *SMALL_SQUARES, *settings]) == 0
    finally:
        os.chdir(before)
    return home / "runs" / "small" / "checkpoints" / "last.ckpt"

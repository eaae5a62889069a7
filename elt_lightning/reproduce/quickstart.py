"""`make quickstart`: train, test over loop counts, and name the files to look at."""

import argparse
import sys
import time

from elt_lightning.cli import run_command, status_of
from elt_lightning.files import next_numbered

CONFIG, PAPER_CONFIG = "configs/quickstart_recall.yaml", "configs/quickstart.yaml"
LOOPS = "1,2,4,8,16"
"""Up to four times the loops of training."""


def main() -> None:
    """Run `elt fit` and `elt test` on the quickstart's config in a new folder under runs/."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--paper", action="store_true", help="the paper's recipe, without recall")
    began = time.perf_counter()
    config = ["--config", PAPER_CONFIG if parser.parse_args().paper else CONFIG]
    run_dir = next_numbered("runs", "quickstart")
    run_command("fit", [*config, "--run_dir", str(run_dir)])
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    test_dir = run_dir / "test"
    run_command("test", [*config, "--ckpt_path", str(checkpoint), "--loops", LOOPS, "--run_dir", str(test_dir)])
    print(f"\ndone in {time.perf_counter() - began:.0f} s. Look at:")
    print(f"  {test_dir / 'loops.png'}    samples, a row for each loop count")
    print(f"  {test_dir / 'pareto.png'}   quality against compute")
    print(f"  {test_dir / 'loops.csv'}    the table above; loops.json has everything")
    print(f"  .venv/bin/tensorboard --logdir {run_dir}    losses and samples during training")
    print("Draw more with:")
    print(f"  .venv/bin/elt sample --ckpt_path {checkpoint} --classes 2 --loops {LOOPS} --output grid.png")


if __name__ == "__main__":
    sys.exit(status_of(main, "quickstart"))

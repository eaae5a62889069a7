"""`make fashion`: real pictures. A tokenizer, a masked and a diffusion ELT with recall, both swept over loop counts.

Whatever is done already is not done again; to begin anew, delete the folders that it names at the end.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from elt_lightning.cli import status_of
from elt_lightning.data.fashion_mnist import find_root
from elt_lightning.data.idx import find_halves, write_idx
from elt_lightning.errors import UserError
from elt_lightning.metrics.handwriting import load_handwriting
from elt_lightning.reproduce.commands import elt, fit, is_measured
from elt_lightning.reproduce.quickstart import LOOPS

TOKENIZER_CONFIG = Path("configs/fashion_tokenizer.yaml")
CONFIGS = {"masked": Path("configs/fashion_recall.yaml"), "diffusion": Path("configs/fashion_diffusion_recall.yaml")}
TOKENS = Path("data/fashion_mnist_tokens")
"""Where the masked model's config looks, too."""

SMOKE = ["--trainer.max_steps=10", "--trainer.val_check_interval=10", "--data.init_args.batch_size=16"]
SMOKE_MODEL = ["--loop_metrics.num_validation_samples=0", "--loop_metrics.num_samples=20"]


def main() -> None:
    """Run what is missing, and name the files to look at."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--root", help="folder of the files; by default where they are found, or they are downloaded")
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion"), help="where runs go")
    parser.add_argument("--tokens", type=Path, default=TOKENS, help="where the tokens go")
    parser.add_argument("--tokens_only", action="store_true", help="stop once there are tokens to train on")
    parser.add_argument("--smoke", action="store_true", help="a few steps, on handwriting in files of the same format")
    options = parser.parse_args()
    began = time.perf_counter()
    if options.smoke:
        options.runs, options.tokens = options.runs / "smoke", options.runs / "smoke" / "tokens"
        options.root = options.root or write_handwriting(options.runs / "files")
    options.root = options.root or found_or_downloaded()
    data = ["--data.init_args.root", options.root, *(SMOKE if options.smoke else [])]
    write_tokens(options.root, data, options.runs / "tokenizer", options.tokens)
    if options.tokens_only:
        return
    for kind, config in CONFIGS.items():
        settings = ["--config", config, *data, *(SMOKE_MODEL if options.smoke else [])]
        if kind == "masked":
            shards = [f"--data.init_args.{side}_shards={options.tokens / folder}" for side, folder in SIDES.items()]
            settings = [*settings, *shards]
        checkpoint, test_dir = fit(settings, options.runs / kind), options.runs / kind / "test"
        if not is_measured(test_dir, checkpoint):
            loops = ["--loops", "1,2,4" if options.smoke else LOOPS]
            fewer = [] if options.smoke or kind == "masked" else ["--num_samples", 500]  # each takes five times as long
            which = ["--ckpt_path", checkpoint, *loops, *fewer, "--run_dir", test_dir]
            elt("test", *settings, *which, "--reconstruction", "--nearest")
    print(f"\ndone in {time.perf_counter() - began:.0f} s. Look at:")
    for kind in CONFIGS:
        print(f"  {options.runs / kind / 'test' / 'loops.png'}     samples, a row for each loop count")
        print(
            f"  {options.runs / kind / 'test' / 'nearest.png'}   samples beside the training pictures nearest to them"
        )
        print(f"  {options.runs / kind / 'test' / 'loops.csv'}     the table above; loops.json has everything")
    print(f"To begin anew, delete {options.runs} and {options.tokens}.")


SIDES = {"training": "train", "val": "test"}
"""The settings that name shards begin with the first word, the folders are called by the second."""


def found_or_downloaded() -> str:
    """Return where Fashion-MNIST is, fetching it where it is not (UserError: it cannot be fetched)."""
    try:
        return find_root(None)
    except UserError:
        return find_root("download")


def write_tokens(root: str, data: list[object], run_dir: Path, tokens: Path) -> None:
    """Train the tokenizer and encode all pictures."""
    fit(["--config", TOKENIZER_CONFIG, *data], run_dir)
    side = find_halves(root)[0].images().shape[1]
    for half, folder, like in zip(find_halves(root), SIDES.values(), (None, tokens / "train"), strict=True):
        kind = ["--tokenizer", "elt_lightning.tokenizers.video_vq.ImageVQ"]
        what = ["--root", half.path, *kind, "--tokenizer_path", run_dir / "tokenizer.safetensors", "--size", side]
        classes = [] if like is None else ["--classes_from", like]
        elt("encode", "images", *what, *classes, "--batch_size", 500, "--num_workers", 0, "--output", tokens / folder)


def write_handwriting(folder: Path) -> str:
    """Write scikit-learn's digits as files of Fashion-MNIST's format, 28×28, where they are not yet."""
    for val, side in ((False, "train"), (True, "t10k")):
        writings = load_handwriting(val)
        pixels = F.interpolate(writings.images, scale_factor=3, mode="bilinear")
        pictures = (F.pad(pixels, (2, 2, 2, 2))[:, 0] * 255).round().to(torch.uint8)
        for name, values in (("images-idx3", pictures), ("labels-idx1", writings.labels)):
            write_idx(folder / f"{side}-{name}-ubyte.gz", values)
    return str(folder)


if __name__ == "__main__":
    sys.exit(status_of(main, "fashion"))

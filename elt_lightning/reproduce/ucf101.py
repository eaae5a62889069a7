"""`make ucf101`: from UCF-101's folder to FVD per loop count, in the commands that a user would type.

A tokenizer is trained, or a ready one taken; clips are encoded; ELT is trained, then measured at every loop count.
Whatever is done already is not done again, so that the same command goes on after an interruption.
"""

import argparse
import shlex
import sys
from pathlib import Path

from elt_lightning.cli import status_of
from elt_lightning.reproduce.imagenet import elt, fit, is_measured


def main() -> None:
    """Run what is missing."""
    options = build_parser().parse_args()
    videos = ["--root", options.root, "--annotations", options.annotations]
    tokenizer = options.tokenizer_path or train_tokenizer(options)
    clips = ["--tokenizer", options.tokenizer, "--tokenizer_path", tokenizer, *shlex.split(options.encode_flags)]
    train, test = options.data / "train_tokens", options.data / "test_tokens"
    elt("encode", "ucf101", *videos, *clips, "--output", train)
    elt("encode", "ucf101", *videos, *clips, "--held_out", "--output", test)
    train_and_test(options, train, test)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help="folder of <Class>/v_<Class>_gXX_cYY.avi")
    parser.add_argument("--annotations", type=Path, required=True, help="ucfTrainTestlist")
    parser.add_argument("--tokenizer", default="video-vq", help="of elt encode ucf101: video-vq or tats")
    parser.add_argument("--tokenizer_path", type=Path, help="a ready tokenizer; by default one is trained")
    parser.add_argument("--tokenizer_config", type=Path, default=Path("configs/ucf101/tokenizer.yaml"))
    parser.add_argument("--config", type=Path, default=Path("configs/ucf101/elt_6n4l.yaml"))
    parser.add_argument("--loops", default="2,3,4,5,6", help="loop counts to measure")
    parser.add_argument("--data", type=Path, default=Path("data/ucf101"), help="where shards go")
    parser.add_argument("--runs", type=Path, default=Path("runs/ucf101"), help="where runs go")
    parser.add_argument("--tokenizer_flags", default="", help="further flags of elt fit for the tokenizer")
    parser.add_argument("--encode_flags", default="--clips_per_video 4", help="further flags of elt encode")
    parser.add_argument("--data_flags", default="", help="further flags of elt fit and elt test: i3d_path, c3d_path, …")
    parser.add_argument("--flags", default="", help="further flags of elt fit and elt test")
    parser.add_argument("--test_flags", default="", help="further flags of elt test alone: protocol, samples, repeats")
    return parser


def train_tokenizer(options: argparse.Namespace) -> Path:
    """Train the tokenizer, or go on with it, and give its file."""
    run_dir = options.runs / "tokenizer"
    videos = [f"--data.init_args.root={options.root}", f"--data.init_args.annotations={options.annotations}"]
    settings = [*videos, *shlex.split(options.tokenizer_flags)]
    fit(["--config", options.tokenizer_config, *settings], run_dir)
    return run_dir / "tokenizer.safetensors"


def train_and_test(options: argparse.Namespace, train: Path, test: Path) -> None:
    """Train ELT on the tokens, or go on with it; then measure it at every loop count."""
    run_dir = options.runs / options.config.stem
    settings = [f"--data.init_args.training_shards={train}", f"--data.init_args.held_out_shards={test}"]
    settings += shlex.split(options.data_flags) + shlex.split(options.flags)
    checkpoint = fit(["--config", options.config, *settings], run_dir)
    if not is_measured(run_dir / "test", checkpoint):
        which = ["--ckpt_path", checkpoint, "--loops", options.loops, "--run_dir", run_dir / "test"]
        which += ["--reconstruction", "--nearest", *shlex.split(options.test_flags)]
        elt("test", "--config", options.config, *settings, *which)
        elt("sample", "--ckpt_path", checkpoint, "--loops", options.loops, "--output", run_dir / "test" / "samples.gif")


if __name__ == "__main__":
    sys.exit(status_of(main, "ucf101"))

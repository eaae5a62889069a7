"""`make ucf101`: from UCF-101's folder to FVD per loop count, in the commands that a user would type.

A tokenizer is trained, or a ready one taken; clips are encoded; ELT is trained, then measured at every loop count.
Whatever is done already is not done again, so that the same command goes on after an interruption.
"""

import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from elt_lightning.reproduce.commands import elt, fit, is_measured

TOKENIZER, TOKENIZER_SMOKE = "configs/ucf101/tokenizer.yaml", "configs/ucf101/tokenizer_smoke.yaml"
SMOKE = "configs/ucf101/smoke.yaml"


def run(config: Path, loops: str, options: Namespace) -> None:
    """Run what is missing of one config, measured at some loop counts."""
    videos = videos_of(options)
    tokenizer = options.tokenizer_path or train_tokenizer(options)
    size = ["--size", "32", "--clips_per_video", "2"] if options.smoke else ["--clips_per_video", "4"]
    clips: list[object] = [word for name, path in videos.items() for word in (f"--{name}", path)]
    clips += ["--tokenizer", options.tokenizer, "--tokenizer_path", tokenizer, *size]
    train, test = options.ucf101 / "train_tokens", options.ucf101 / "test_tokens"
    elt("encode", "ucf101", *clips, "--output", train, dry_run=options.dry_run)
    elt("encode", "ucf101", *clips, "--val", "--output", test, dry_run=options.dry_run)
    data = {
        "training_shards": train,
        "val_shards": test,
        **videos,
        "i3d_path": options.i3d,
        "c3d_path": options.c3d,
        "cache": options.small / "ucf101" / "cache" if options.smoke else None,
    }
    settings: list[object] = ["--config", config, *(["--config", SMOKE] if options.smoke else [])]
    settings += [f"--data.init_args.{name}={value}" for name, value in data.items() if value is not None]
    run_dir = options.video_runs / config.stem
    checkpoint = fit(settings, run_dir, options.dry_run)
    if not is_measured(run_dir / "test", checkpoint):
        which = ["--ckpt_path", checkpoint, "--loops", loops, "--run_dir", run_dir / "test"]
        which += ["--reconstruction", "--nearest", *shlex.split(options.protocol_flags)]
        elt("test", *settings, *which, dry_run=options.dry_run)
        drawn = ["--loops", loops, "--output", run_dir / "test" / "samples.gif"]
        elt("sample", "--ckpt_path", checkpoint, *drawn, dry_run=options.dry_run)


def smoke(options: Namespace) -> Namespace:
    """Write moving digits in UCF-101's layout and small networks, and return the options that work on them."""
    folder = options.small / "ucf101"
    files = folder / "files"
    if not options.dry_run:
        subprocess.run([sys.executable, "tests/ucf101_stand_ins.py", str(files)], check=True)
    small = {
        "ucf101": files / "videos",
        "i3d": files / "i3d.pt",
        "c3d": files / "c3d.pt",
        "video_runs": folder / "runs",
        "protocol_flags": "",
    }
    return Namespace(**vars(options) | small)


def videos_of(options: Namespace) -> dict[str, Path]:
    """Return the settings of a data module that say where the videos are."""
    return {"root": options.ucf101 / "UCF-101", "annotations": options.ucf101 / "ucfTrainTestlist"}


def train_tokenizer(options: Namespace) -> Path:
    """Train the tokenizer, or go on with it, and return its file."""
    run_dir = options.video_runs / "tokenizer"
    configs: list[object] = ["--config", TOKENIZER, *(["--config", TOKENIZER_SMOKE] if options.smoke else [])]
    videos = [f"--data.init_args.{name}={value}" for name, value in videos_of(options).items()]
    fit([*configs, *videos], run_dir, options.dry_run)
    return run_dir / "tokenizer.safetensors"


def measure_at_24_steps(options: Namespace) -> None:
    """Measure Table 4's last row, which is the model of the row above at more loops and steps."""
    run_dir = options.video_runs / "elt_6n4l"
    checkpoint, test_dir = run_dir / "checkpoints" / "last.ckpt", run_dir / "test_24_steps"
    if checkpoint.exists() and not is_measured(test_dir, checkpoint):
        which = ["--loops", "6", "--model.sampler.init_args.steps", "24", *shlex.split(options.protocol_flags)]
        elt("test", "--ckpt_path", checkpoint, *which, "--run_dir", test_dir, dry_run=options.dry_run)

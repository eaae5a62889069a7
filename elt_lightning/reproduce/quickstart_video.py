"""`make quickstart-video`: a tokenizer of clips, then a looped generator on its tokens, on moving digits.

Whatever is done already is not done again; to begin anew, delete the folders that it names at the end.
"""

import argparse
import sys
import time
from pathlib import Path

from elt_lightning.cli import status_of
from elt_lightning.data.toy.moving_digits import LISTS, VIDEOS
from elt_lightning.reproduce.commands import elt, fit, is_measured
from elt_lightning.reproduce.quickstart import LOOPS

TOKENIZER_CONFIG = Path("configs/quickstart_video_tokenizer.yaml")
CONFIG, PAPER_CONFIG = Path("configs/quickstart_video_recall.yaml"), Path("configs/quickstart_video.yaml")
VIDEO_FOLDER, TOKENS = Path("data/moving_digits"), Path("data/moving_digits_tokens")
"""Where both configs' data modules look, too."""

CLIPS = ["--size", "16", "--num_frames", "8", "--stride", "2"]
"""As the tokenizer's config has them."""


def main() -> None:
    """Run what is missing, and name the files to look at."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart_video"), help="where runs go")
    parser.add_argument("--tokens_only", action="store_true", help="stop once there are tokens to train on")
    parser.add_argument("--paper", action="store_true", help="the paper's recipe, without recall")
    options = parser.parse_args()
    began = time.perf_counter()
    write_tokens(options.runs / "tokenizer")
    if options.tokens_only:
        return
    run_dir = options.runs / ("elt_paper" if options.paper else "elt")
    config, test_dir = PAPER_CONFIG if options.paper else CONFIG, run_dir / "test"
    checkpoint = fit(["--config", config], run_dir)
    if not is_measured(test_dir, checkpoint):
        which = ["--ckpt_path", checkpoint, "--loops", LOOPS, "--run_dir", test_dir]
        elt("test", "--config", config, *which, "--reconstruction", "--nearest")
    print(f"\ndone in {time.perf_counter() - began:.0f} s. Look at:")
    print(f"  {test_dir / 'loops.gif'}     samples, a row for each loop count")
    print(f"  {test_dir / 'nearest.png'}   samples beside the training clips that they are nearest to")
    print(f"  {test_dir / 'pareto.png'}    quality against compute")
    print(f"  {test_dir / 'loops.csv'}     the table above; loops.json has everything")
    print(f"To begin anew, delete {options.runs} and {TOKENS}. Draw what may follow a clip's first frames with:")
    clip = next(iter(sorted((VIDEO_FOLDER / VIDEOS / "Clockwise").glob("*.avi"))), "CLIP.avi")
    print(
        f"  .venv/bin/elt sample --ckpt_path {checkpoint} --classes 1 --loops {LOOPS} --given {clip} "
        "--given_frames 2 --given_stride 2 --output rest.gif"
    )


def write_tokens(run_dir: Path) -> None:
    """Train the tokenizer and encode all clips."""
    fit(["--config", TOKENIZER_CONFIG], run_dir)
    videos = ["--root", VIDEO_FOLDER / VIDEOS, "--annotations", VIDEO_FOLDER / LISTS]
    tokenizer = ["--tokenizer", "video-vq", "--tokenizer_path", run_dir / "tokenizer.safetensors"]
    for side, which in (("train", ["--clips_per_video", "8"]), ("test", ["--clips_per_video", "4", "--val"])):
        elt("encode", "ucf101", *videos, *tokenizer, *CLIPS, *which, "--output", TOKENS / side)


if __name__ == "__main__":
    sys.exit(status_of(main, "quickstart_video"))

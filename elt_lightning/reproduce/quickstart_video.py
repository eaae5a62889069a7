"""`make quickstart-video`: a looped generator of clips, digits that move, on the tokens of a 3D-VQ tokenizer.

The tokenizer comes with the repository; ``--train_tokenizer`` trains it anew. Whatever is done already is not done
again; to begin anew, delete the folders that it names at the end.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from elt_lightning.checkpoints import shipped
from elt_lightning.cli import status_of
from elt_lightning.data.toy.moving_digits import LISTS, VIDEOS, MovingDigitsDataModule
from elt_lightning.files import write_json
from elt_lightning.reproduce import clip_reading
from elt_lightning.reproduce.commands import elt, fit, is_measured
from elt_lightning.reproduce.quickstart import LOOPS
from elt_lightning.tokenizers.video_vq import VideoVQ

CONFIG, PAPER_CONFIG = Path("configs/clips_recall.yaml"), Path("configs/clips.yaml")


@dataclass(frozen=True)
class Clips:
    """Clips and their tokenizer; they lie where the configs of both look for them."""

    tokenizer_config: Path  # it says what is drawn, too
    tokens: Path
    clips_per_video: tuple[int, int]  # in training, held out
    runs: Path

    def data(self) -> MovingDigitsDataModule:
        """Return what the tokenizer's config draws."""
        return MovingDigitsDataModule(**yaml.safe_load(self.tokenizer_config.read_text())["data"]["init_args"])


SHARP = Clips(Path("configs/clips_tokenizer.yaml"), Path("data/clips_tokens"), (1, 1), Path("runs/clips"))
SOFT = Clips(
    Path("configs/quickstart_video_tokenizer.yaml"),
    Path("data/moving_digits_tokens"),
    (8, 4),
    Path("runs/quickstart_video"),
)
"""Of the experiments: small and grey, since what they compare is motion."""

READY = shipped.FOLDER / "clips" / "tokenizer.safetensors"
"""The tokenizer that comes along, with a model of the same clips."""


def main() -> None:
    """Run what is missing, and name the files to look at."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, help=f"where runs go; by default {SHARP.runs}, or {SOFT.runs} if soft")
    parser.add_argument("--train_tokenizer", action="store_true", help="in place of the one that comes along")
    parser.add_argument("--soft", action="store_true", help="make the tokens that the experiments train on, and stop")
    parser.add_argument("--paper", action="store_true", help="the paper's recipe, without recall")
    options = parser.parse_args()
    clips = SOFT if options.soft else SHARP
    runs = options.runs or clips.runs
    began = time.perf_counter()
    tokenizer = READY
    if options.train_tokenizer or options.soft:
        fit(["--config", clips.tokenizer_config], runs / "tokenizer")
        tokenizer = runs / "tokenizer" / "tokenizer.safetensors"
    write_tokens(clips, tokenizer)
    if options.soft:
        return
    data = clips.data()
    kept = clip_reading.measure(data.files, Path(data.folder), VideoVQ(str(tokenizer)), data.shape.stride)
    write_json(runs / "tokenizer.json", asdict(kept))
    print(f"the tokenizer: {kept}", flush=True)
    run_dir = runs / ("elt_paper" if options.paper else "elt")
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
    print(f"  {runs / 'tokenizer.json'}    what the tokenizer keeps")
    print(f"To begin anew, delete {runs} and {clips.tokens}. Draw what may follow a clip's first frames with:")
    clip = next(iter(sorted((Path(data.folder) / VIDEOS / "Clockwise").glob("*.avi"))), "CLIP.avi")
    print(
        f"  .venv/bin/elt sample --ckpt_path {checkpoint} --classes 1 --loops {LOOPS} --given {clip} "
        f"--given_frames 2 --given_stride {data.shape.stride} --output rest.gif"
    )


def write_tokens(clips: Clips, tokenizer: Path) -> None:
    """Draw the videos, if they are not there yet, and encode all clips."""
    data = clips.data()
    data.prepare_data()
    shape = ["--size", data.shape.size, "--num_frames", data.shape.num_frames, "--stride", data.shape.stride]
    videos = ["--root", Path(data.folder) / VIDEOS, "--annotations", Path(data.folder) / LISTS]
    kind = ["--tokenizer", "video-vq", "--tokenizer_path", tokenizer]
    for side, clips_per_video, val in zip(("train", "test"), clips.clips_per_video, ([], ["--val"]), strict=True):
        which = ["--clips_per_video", clips_per_video, *val]
        elt("encode", "ucf101", *videos, *kind, *shape, *which, "--output", clips.tokens / side)


if __name__ == "__main__":
    sys.exit(status_of(main, "quickstart_video"))

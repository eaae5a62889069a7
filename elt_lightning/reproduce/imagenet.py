"""`make imagenet`: from ImageNet's folder to rows of the paper's tables, in the commands that a user would type.

Pictures are encoded, each model is trained, then measured at every loop count; whatever is done already is not done
again, so that the same command goes on after an interruption.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import run_command, status_of
from elt_lightning.errors import UserError
from elt_lightning.files import next_numbered
from elt_lightning.reproduce.sweeps import read_sweep

TOKENIZERS = {"masked": ("maskgit-vqgan", "tokens"), "diffusion": ("sd-vae", "latents")}
"""Of each family: the tokenizer of ``elt encode``, and what its shards are called."""

SWEPT_WHOLE = 8
"""Up to this L_max a model is measured at every loop count and two beyond; above it at those that its config names."""

GUIDANCE = {"masked": ["--guidance", "1,2,3,4"], "diffusion": []}
"""Of each family: scales of guidance to measure at. The paper sweeps masked models, and has one scale of diffusion."""


@dataclass(frozen=True)
class Model:
    """A row of Table 1 or 2.

    Attributes:
        name: of its config in configs/imagenet256.
        family: "masked" or "diffusion".
        max_loops: L_max.
    """

    name: str
    family: str
    max_loops: int

    @property
    def config(self) -> Path:
        """The config's path."""
        return Path("configs/imagenet256") / f"{self.name}.yaml"


MODELS = {
    model.name: model
    for model in (
        Model("maskgit_l", "masked", 1),
        Model("maskgit_xl", "masked", 1),
        Model("elt_l_8n3l", "masked", 3),
        Model("elt_l_12n2l", "masked", 2),
        Model("elt_xl_7n4l", "masked", 4),
        Model("dit_16", "diffusion", 1),
        Model("dit_32", "diffusion", 1),
        Model("elt_1n32l", "diffusion", 32),
        Model("elt_4n8l", "diffusion", 8),
        Model("elt_8n4l", "diffusion", 4),
        Model("elt_16n2l", "diffusion", 2),
    )
}


def main() -> None:
    """Run what is missing.

    Raises:
        UserError: a setting is missing or wrong.
    """
    options = build_parser().parse_args()
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise UserError(f"there is no model {unknown[0]}: choose from {', '.join(MODELS)}")
    models = [MODELS[name] for name in names]
    for family in sorted({model.family for model in models}):
        encode(family, options)
    for model in models:
        common = train(model, options)
        if not options.train_only:
            test(model, common, options)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--val_labels", type=Path, help="classes of val/, where its pictures lie in one flat folder")
    parser.add_argument("--vqgan", help="MaskGIT's VQGAN, for masked models")
    parser.add_argument("--vae", help="Stable Diffusion's autoencoder, for diffusion models")
    parser.add_argument("--inception", default="download", help="FID's Inception weights")
    parser.add_argument("--reference", required=True, help="npz of reference moments, or a folder of pictures")
    parser.add_argument("--models", default="elt_l_8n3l", help=f"comma-separated, from {', '.join(MODELS)}")
    parser.add_argument("--data", type=Path, default=Path("data/imagenet256"), help="where shards go")
    parser.add_argument("--runs", type=Path, default=Path("runs/imagenet256"), help="where runs go")
    parser.add_argument("--encode_flags", default="", help="further flags of elt encode")
    parser.add_argument("--flags", default="", help="further flags of elt fit and elt test")
    parser.add_argument("--test_flags", default="", help="further flags of elt test alone: loops, samples to keep")
    parser.add_argument("--train_only", action="store_true", help="measure nothing")
    return parser


def encode(family: str, options: argparse.Namespace) -> None:
    """Encode both sets for one family; `elt encode` itself goes on where it stopped."""
    tokenizer, kind = TOKENIZERS[family]
    path = options.vqgan if family == "masked" else options.vae
    if path is None:
        raise UserError(f"{family} models need --{'vqgan' if family == 'masked' else 'vae'}")
    train, val = options.data / f"train_{kind}", options.data / f"val_{kind}"
    common = ["--tokenizer", tokenizer, "--tokenizer_path", path, *shlex.split(options.encode_flags)]
    elt("encode", "imagenet", "--root", options.root / "train", "--output", train, "--mirrored", *common)
    labels = [] if options.val_labels is None else ["--labels", options.val_labels]
    elt(
        "encode", "imagenet", "--root", options.root / "val", *labels, "--classes_from", train, "--output", val, *common
    )


def train(model: Model, options: argparse.Namespace) -> list[object]:
    """Train a model, or go on with it; give what `elt test` has in common with it."""
    run_dir = options.runs / model.name
    kind = TOKENIZERS[model.family][1]
    data = {
        "training_shards": options.data / f"train_{kind}",
        "held_out_shards": options.data / f"val_{kind}",
        "inception_path": options.inception,
        "reference": options.reference,
    }
    common = ["--config", model.config, *(f"--data.init_args.{name}={value}" for name, value in data.items())]
    common += shlex.split(options.flags)
    fit(common, run_dir)
    return common


def test(model: Model, common: list[object], options: argparse.Namespace) -> None:
    """Measure a model at its loop counts."""
    run_dir = options.runs / model.name
    checkpoint, test_dir = last_checkpoint(run_dir), run_dir / "test"
    if is_measured(test_dir, checkpoint):
        return
    loops = [1] if model.max_loops == 1 else range(1, model.max_loops + 3)
    which = [] if model.max_loops > SWEPT_WHOLE else ["--loops", ",".join(map(str, loops))]
    which += [*GUIDANCE[model.family], "--reconstruction", *shlex.split(options.test_flags)]
    elt("test", *common, "--run_dir", test_dir, "--ckpt_path", checkpoint, *which)


def fit(settings: list[object], run_dir: Path) -> Path:
    """Train in a folder, going on where a checkpoint is; give the last one."""
    checkpoint = last_checkpoint(run_dir)
    elt("fit", *settings, "--run_dir", run_dir, *(["--ckpt_path", checkpoint] if checkpoint.exists() else []))
    return checkpoint


def last_checkpoint(run_dir: Path) -> Path:
    """Where a run's last checkpoint is."""
    return run_dir / "checkpoints" / "last.ckpt"


def is_measured(test_dir: Path, checkpoint: Path) -> bool:
    """Say whether a sweep is of a checkpoint as it is now; one of an earlier step is moved out of the way.

    Raises:
        UserError: sweep or checkpoint cannot be read.
    """
    if not (test_dir / "loops.json").is_file():
        return False
    measured = read_sweep(test_dir / "loops.json")["train_steps"]
    trained = read_checkpoint(checkpoint, prefixes=())["global_step"]
    if measured != trained:
        earlier = test_dir.rename(next_numbered(test_dir.parent, "earlier_test"))
        print(f"{earlier} has what was measured after {measured:,} steps; the checkpoint is of {trained:,} now")
    return bool(measured == trained)


def elt(*arguments: object) -> None:
    """Show a command and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ elt {shlex.join(words)}", flush=True)
    run_command(words[0], words[1:])


if __name__ == "__main__":
    sys.exit(status_of(main, "imagenet"))

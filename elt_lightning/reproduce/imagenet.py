"""`make imagenet`: from ImageNet's folder to rows of Tables 1 and 2, in the commands that a user would type.

Pictures are encoded, each model is trained, then measured at every loop count; whatever is done already is not done
again, so that the same command goes on after an interruption.
"""

import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence

from elt_lightning.errors import UserError
from elt_lightning.reproduce.commands import elt, fit, is_measured
from elt_lightning.reproduce.published import TABLE_1, TABLE_2, Row

MODELS = {str(row.name): row for row in (*TABLE_1, *TABLE_2)}

TOKENIZERS = {"masked": ("maskgit-vqgan", "tokens", "vqgan"), "diffusion": ("sd-vae", "latents", "vae")}
"""Of each family: the tokenizer of ``elt encode``, what its shards are called, the option that names its file."""

SWEPT_WHOLE = 8
"""Up to this L_max a model is measured at every loop count and two beyond; above it at those that its config names."""

GUIDANCE = {"masked": ["--guidance", "1,2,3,4"], "diffusion": []}
"""Of each family: scales of guidance to measure at. The paper sweeps masked models, and has one scale of diffusion."""

SMOKE = "configs/imagenet256/smoke.yaml"


def family_of(name: str) -> str:
    """Return "masked" or "diffusion" (UserError: there is no such model)."""
    if name not in MODELS:
        raise UserError(f"there is no model {name}: choose from {', '.join(MODELS)}")
    return "masked" if MODELS[name].table == 1 else "diffusion"


def run(names: Sequence[str], options: Namespace, mode: str = "ilsd", train_only: bool = False) -> None:
    """Run what is missing of some models; runs of another mode than "ilsd" have a folder of its name.

    Raises:
        UserError: a setting is missing or wrong.
    """
    for family in sorted({family_of(name) for name in names}):
        encode(family, options)
    for name in names:
        flags = [] if mode == "ilsd" else [f"--model.distillation.mode={mode}"]
        settings = [*settings_of(MODELS[name], options), *flags]
        run_dir = (options.runs if mode == "ilsd" else options.runs / mode) / name
        checkpoint = fit(settings, run_dir, options.dry_run)
        if not train_only and not is_measured(run_dir / "test", checkpoint):
            which = ["--run_dir", run_dir / "test", "--ckpt_path", checkpoint, *sweep_of(MODELS[name])]
            elt("test", *settings, *which, *shlex.split(options.test_flags), dry_run=options.dry_run)


def smoke(options: Namespace) -> Namespace:
    """Draw small pictures, write random networks in the published formats, and return the options that work on them."""
    folder = options.small / "imagenet"
    files = folder / "files"
    if not options.dry_run:
        subprocess.run([sys.executable, "tests/imagenet_stand_ins.py", str(files)], check=True)
    small = {
        "imagenet": files / "imagenet",
        "val_labels": files / "val_labels.csv",
        "vqgan": files / "vqgan.bin",
        "vae": files / "vae",
        "inception": files / "inception.pth",
        "reference": files / "imagenet" / "val",
        "data": folder / "data",
        "runs": folder / "runs",
        "test_flags": f"--save_samples samples.npz {options.test_flags}",
    }
    return Namespace(**vars(options) | small)


def encode(family: str, options: Namespace) -> None:
    """Encode both sets for one family; `elt encode` itself goes on where it stopped."""
    tokenizer, kind, option = TOKENIZERS[family]
    path = getattr(options, option)
    if path is None:
        raise UserError(f"{family} models need --{option}")
    train, val = options.data / f"train_{kind}", options.data / f"val_{kind}"
    common = ["--tokenizer", tokenizer, "--tokenizer_path", path]
    common += shlex.split("--size 64 --max_unreadable 0.5 --samples_per_shard 10" if options.smoke else "")
    pictures = ["--root", options.imagenet / "train", "--output", train, "--mirrored"]
    elt("encode", "imagenet", *pictures, *common, dry_run=options.dry_run)
    labels = [] if options.val_labels is None else ["--labels", options.val_labels]
    pictures = ["--root", options.imagenet / "val", *labels, "--classes_from", train, "--output", val]
    elt("encode", "imagenet", *pictures, *common, dry_run=options.dry_run)


def settings_of(row: Row, options: Namespace) -> list[object]:
    """Return what `elt fit` and `elt test` of a model have in common."""
    kind = TOKENIZERS[family_of(str(row.name))][1]
    data = {
        "training_shards": options.data / f"train_{kind}",
        "val_shards": options.data / f"val_{kind}",
        "inception_path": options.inception,
        "reference": options.reference,
    }
    if options.smoke:
        data["cache"] = options.small / "imagenet" / "cache"
    configs = ["--config", row.config, *(["--config", SMOKE] if options.smoke else [])]
    return [*configs, *(f"--data.init_args.{name}={value}" for name, value in data.items())]


def sweep_of(row: Row) -> list[object]:
    """Return the flags of `elt test` that say at which loop counts and scales of guidance a model is measured."""
    loops = [1] if row.loops == 1 else range(1, row.loops + 3)
    which = [] if row.loops > SWEPT_WHOLE else ["--loops", ",".join(map(str, loops))]
    return [*which, *GUIDANCE[family_of(str(row.name))], "--reconstruction"]

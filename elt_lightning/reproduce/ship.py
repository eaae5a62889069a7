"""`python -m elt_lightning.reproduce.ship`: put a trained model into the package, with the sweep that judged it."""

import argparse
import shutil
import sys
from pathlib import Path

from lightning.pytorch.cli import instantiate_class

from elt_lightning.checkpoints import shipped
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import run_command, status_of
from elt_lightning.errors import UserError
from elt_lightning.evaluation.drawing import Drawing, load
from elt_lightning.files import write_json

MOST_BYTES = 4_000_000
"""Of all models that come along."""


def means(model: Drawing, num: int = 8) -> list[float]:
    """Draw ``num`` samples of seed 0, all classes in turn, at the loop count of training; return their mean pixels."""
    sampler, loops = model.sampler()
    pixels = model.shown(model.codes(model.labels(None, num), loops, sampler))
    return [round(mean, 3) for mean in pixels.flatten(1).double().mean(1).tolist()]


def main() -> None:
    """Export a checkpoint into the package's folder (UserError: there would be too much)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help="of the model, a word")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of elt fit")
    parser.add_argument("--sweep", required=True, type=Path, help="folder that elt test wrote")
    parser.add_argument("--draws", required=True, help="what the model draws, in a few words")
    parser.add_argument("--command", required=True, help="that trained it")
    options = parser.parse_args()
    folder = shipped.FOLDER / options.name
    recipe = read_checkpoint(options.ckpt_path)["elt"]
    flags = ["--with_tokenizer"] if recipe["tokenizer"].get("sha256") else []
    run_command("export", ["--ckpt_path", options.ckpt_path, "--output", str(folder), "--overwrite", *flags])
    shutil.copyfile(options.sweep / shipped.SWEEP, folder / shipped.SWEEP)
    made = {"draws": options.draws, "command": options.command, "seed": recipe["model"]["seed"], "data": recipe["data"]}
    made["class_names"] = instantiate_class((), recipe["data"]).class_names
    write_json(folder / shipped.MADE, made | {"means": means(load(folder))})
    total = sum(path.stat().st_size for path in shipped.FOLDER.glob("*/*"))
    print(f"{folder}: all models together are {total / 1e6:.2f} MB")
    if total > MOST_BYTES:
        raise UserError(f"that is more than {MOST_BYTES / 1e6:g} MB: ship a smaller model")


if __name__ == "__main__":
    sys.exit(status_of(main, "ship"))

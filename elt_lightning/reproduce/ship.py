"""`python -m elt_lightning.reproduce.ship`: put a trained model into the package, with the sweep that judged it.

Its weights are rounded to half precision after the sweep; that they still score as it says is what
``tests/test_shipped.py`` holds.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from lightning.pytorch.cli import instantiate_class
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elt_lightning.checkpoints import shipped
from elt_lightning.checkpoints.store import CONFIG, TOKENIZER, read_checkpoint
from elt_lightning.cli import run_command, status_of
from elt_lightning.errors import UserError
from elt_lightning.evaluation.drawing import Drawing, load
from elt_lightning.files import sha256, write_json

MOST_BYTES = 4_000_000
"""Of all models that come along."""

WORTH_HALVING = 100_000
"""Bytes; smaller files stay as they are."""


def means(model: Drawing, num: int = 8) -> list[float]:
    """Draw ``num`` samples of seed 0, all classes in turn, at the loop count of training; return their mean pixels."""
    sampler, loops = model.sampler()
    pixels = model.shown(model.codes(model.labels(None, num), loops, sampler))
    return [round(mean, 3) for mean in pixels.flatten(1).double().mean(1).tolist()]


def halve(folder: Path) -> None:
    """Round large safetensors of a folder to float16, half as large; loading makes float32 of them again."""
    for path in folder.glob("*.safetensors"):
        if path.stat().st_size < WORTH_HALVING:
            continue
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(state, path, metadata)
        if path.stem == TOKENIZER:
            config = json.loads((folder / CONFIG).read_text())
            config["tokenizer"]["sha256"] = sha256(path)
            write_json(folder / CONFIG, config)


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
    halve(folder)
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

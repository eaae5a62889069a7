"""`elt import`: published weights of DiT or SiT as a model folder, with the noise and the sampler of their own code."""

import argparse
from pathlib import Path

from elt_lightning.checkpoints.dit import read_dit
from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.commands.arguments import Parser, whole
from elt_lightning.commands.export import check_free, describe, write_model


def run(name: str, arguments: list[str]) -> None:
    """Write what the command line asks for.

    Raises:
        UserError: the command line or the file is wrong, or the folder cannot be written.
    """
    options = build_parser().parse_args(arguments)
    check_free(options.output, options.overwrite)
    model, state, part = read_dit(options.file, options.kind, options.num_heads)
    weights = "raw" if part == "model" else "ema"
    tokenizer = {
        "class_path": "elt_lightning.tokenizers.kl_vae.KLAutoencoder",
        "init_args": {"path": options.vae, "scale": 0.18215},
    }
    data = {"class_path": "elt_lightning.data.imagenet.ImageNetDataModule"}
    recipe = {"data": data, "model": model, "tokenizer": tokenizer}
    checkpoint = {"elt": recipe, "state_dict": state, "exported": weights, "global_step": None}
    module = build_module(checkpoint)
    network = model["network"]["init_args"]
    parameters = sum(value.numel() for value in state.values())
    taken = {"ema": " of its average", "model": " of model, as it holds no average"}.get(str(part), "")
    shape = "×".join(map(str, network["input_shape"]))
    print(
        f"taken over: {len(state)} tensors{taken}, {parameters:,} parameters of {network['num_layers']} layers of "
        f"width {network['width']}, for latents {shape} of {network['num_classes']} classes"
    )
    write_model(options.output, module, describe(checkpoint, weights))
    print(options.output)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt import", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("kind", choices=("dit", "sit"), help="facebookresearch/DiT or willisma/SiT")
    add("--file", required=True, type=Path, metavar="F", help="DiT-XL-2-256x256.pt, a checkpoint of their training, …")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write; it is made")
    add("--num_heads", type=whole(1), metavar="N", help="attention heads, for widths that were not published")
    vae = "stabilityai/sd-vae-ft-ema"
    add("--vae", default=vae, metavar="PATH", help=f"autoencoder of the latents: a folder or name (default {vae})")
    add("--overwrite", action="store_true", help="replace a model that is there")
    return parser

"""`elt sample`: a picture from a checkpoint alone, one row for each loop count."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from elt_lightning.checkpoints import build_module, build_tokenizer, read_checkpoint
from elt_lightning.errors import UserError
from elt_lightning.files import written_aside
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.reports import loops_figure


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the rest of the program does."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        raise UserError(f"elt sample: {message}")


def run(name: str, arguments: list[str]) -> None:
    """Draw the picture that the command line asks for.

    Raises:
        UserError: the command line, the checkpoint or its tokenizer is wrong.
    """
    options = build_parser().parse_args(arguments)
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists: choose another --output, or add --overwrite")
    checkpoint = read_checkpoint(options.ckpt_path)
    module = build_module(checkpoint, options.weights)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = build_tokenizer(checkpoint, options.tokenizer_path).to(device)
    module.to(device)
    classes = options.classes or list(range(module.num_classes))
    if max(classes) >= module.num_classes:
        raise UserError(f"--classes: the model's classes are 0 to {module.num_classes - 1}, not {max(classes)}")
    sampler = module.sampler
    if options.steps is not None:
        sampler.steps = options.steps
    if options.guidance is not None:
        sampler = sampler.with_guidance_scale(options.guidance)
    index = torch.arange(options.num, device=device)
    labels = torch.tensor(classes, device=device)[index % len(classes)]
    rows = {}
    for loops in options.loops or [module.max_loops]:
        codes = module.sample(labels, loops, sample_seeds(options.seed, index), sampler=sampler)
        rows[f"L = {loops}"] = tokenizer.present(tokenizer.decode(codes)).cpu()
    with written_aside(options.output) as aside:
        loops_figure(rows).savefig(aside, bbox_inches="tight")
    print(options.output)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt sample", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ckpt_path", required=True, metavar="PATH", help="checkpoint of elt fit")
    parser.add_argument("--classes", type=numbers_from(0), metavar="3,7", help="classes, taken in turn; all by default")
    parser.add_argument("--num", type=number_from(1), default=8, help="samples in a row (default 8)")
    parser.add_argument(
        "--loops", type=numbers_from(1), metavar="1,2,4", help="a row each; by default the count of training"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale; by default the model's")
    parser.add_argument("--steps", type=number_from(1), help="sampling steps; by default the model's")
    parser.add_argument("--seed", type=number_from(0), default=0, help="decides every sample (default 0)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="averaged weights (default) or raw ones"
    )
    parser.add_argument("--tokenizer_path", metavar="PATH", help="where the tokenizer's file lies, if it has moved")
    parser.add_argument("--device", help="for example cuda:1; by default a GPU where there is one")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="picture to write (default grid.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    return parser


def number_from(smallest: int) -> Callable[[str], int]:
    """Make a type of arguments that are whole numbers from ``smallest`` up."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} up")
        return int(text)

    return parse


def numbers_from(smallest: int) -> Callable[[str], list[int]]:
    """Make a type of arguments that are lists such as 1,2,4."""
    parse = number_from(smallest)
    return lambda text: [parse(part) for part in text.split(",")]

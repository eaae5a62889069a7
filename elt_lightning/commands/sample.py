"""`elt sample`: a picture from a model alone, one row for each loop count."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from elt_lightning.commands.arguments import Parser, whole, wholes
from elt_lightning.commands.drawing_arguments import (
    add_model_arguments,
    add_sampler_arguments,
    chosen_model,
    sampler_settings,
)
from elt_lightning.errors import MOST, UserError
from elt_lightning.evaluation.given import Hole, read_given
from elt_lightning.evaluation.pictures import loops_figure, write_figure, write_gif, write_mp4
from elt_lightning.evaluation.plans import read_plan
from elt_lightning.training.announce import announce

FILMS = (".gif", ".mp4")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg", *FILMS)
"""What an output may end in; films are of clips."""


def run(name: str, arguments: list[str]) -> None:
    """Draw the picture that the command line asks for.

    Raises:
        UserError: the command line, the checkpoint or its tokenizer is wrong.
    """
    parser, plan = build_parser(), None
    options = parser.parse_args(arguments)
    if options.plan is not None:
        plan = read_plan(options.plan)
        best = plan.settings
        planned = {"loops": [best["loops"]], "carry_state": str(best["carry_state"]).lower()}
        parser.set_defaults(**best | planned)  # flags win
        options = parser.parse_args(arguments)
    if (options.given is None) != (options.given_frames is None and options.hole is None):
        raise UserError("--given goes with --given_frames, --hole or both, which say what of it is given")
    if options.given is None and options.given_stride != 1:
        raise UserError("--given_stride goes with --given, whose frames it counts")
    if len(options.classes or ()) > options.num:
        raise UserError(f"--classes names {len(options.classes)}, and --num {options.num} draws no more: raise --num")
    if options.output.is_dir():
        raise UserError(f"{options.output} is a folder: choose another --output")
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists: choose another --output, or add --overwrite")
    if options.output.suffix not in SUFFIXES:
        raise UserError(f"{options.output}: choose a name that ends in {', '.join(SUFFIXES)}")
    model = chosen_model(options)
    module, tokenizer = model.module, model.tokenizer
    if plan is not None:
        plan.check(model.recipe)
    if options.output.suffix in FILMS and len(module.grid) != 3:
        raise UserError(
            f"{options.output}: the model's samples are pictures, not clips: choose a name that ends in .png"
        )
    labels, asked = model.labels(options.classes, options.num), sampler_settings(options)
    counts = options.loops if isinstance(options.loops, list) else [options.loops]
    settled = [model.sampler(loops, **asked) for loops in counts]
    rows, known = {}, None
    if options.given is not None:
        given = read_given(options.given, module, tokenizer, options.given_frames, options.hole, options.given_stride)
        known = given.known.expand(options.num, *given.known.shape[1:])
        rows["given"] = torch.cat(options.num * [tokenizer.present(given.pixels).cpu()])
    for sampler, loops in settled:
        macs = options.num * module.macs_per_sample(loops, sampler)
        announce(f"L = {loops}", macs, module, sampler, options.num)
        spent: list[Tensor] = []
        pixels = model.shown(model.codes(labels, loops, sampler, options.seed, known, spent))
        if sampler.loop_schedule.tolerance is not None:
            used = torch.stack(spent).mean(0)
            print(
                f"at most {loops} loops: {used.mean():.3g} on average, {used.min():.3g} to {used.max():.3g} of a sample"
            )
        rows[f"L = {loops}"] = pixels
    write_samples(options.output, rows)
    print(options.output)


def write_samples(output: Path, rows: dict[str, Tensor]) -> None:
    """Write samples as a picture with a row for each loop count; clips as a GIF or MP4 where the name ends so."""
    if output.suffix not in FILMS:
        write_figure(output, loops_figure(rows))
        return
    if output.suffix == ".gif":
        write_gif(output, rows)
    else:
        # Rows of clips, C F H W each: across the width, then down the height.
        write_mp4(output, torch.cat([torch.cat(list(clips), dim=-1) for clips in rows.values()], dim=-2))


def hole(text: str) -> Hole:
    """Parse top, left, bottom and right."""
    numbers = wholes(0)(text)
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not top, left, bottom and right, such as 2,2,6,6")
    top, left, bottom, right = numbers
    return top, left, bottom, right


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt sample", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add_model_arguments(parser, required=True)
    add("--classes", type=wholes(0), metavar="3,7", help="classes, taken in turn; all by default")
    add("--num", type=whole(1, 10**5), default=8, help="samples in a row (default 8)")
    add(
        "--loops",
        type=lambda text: text if text == "auto" else wholes(1, MOST["loops"])(text),
        metavar="1,2,4",
        help="a row each; by default the count of training; auto: until --tolerance is met",
    )
    add("--plan", type=Path, metavar="PATH", help="sample at the best setting of a plan of elt calibrate; flags win")
    add_sampler_arguments(parser)
    add("--given", type=Path, metavar="FILE", help="clip or picture of which a part is given")
    add("--given_frames", type=whole(1), metavar="K", help="given are its first K frames of the token grid")
    add("--given_stride", type=whole(1), default=1, help="frames of FILE from one to the next")
    add("--hole", type=hole, metavar="2,2,6,6", help="not given are these top, left, bottom, right cells of the grid")
    add(
        "--output",
        type=Path,
        default=Path("grid.png"),
        help="picture to write (default grid.png); of clips .gif and .mp4 too",
    )
    add("--overwrite", action="store_true", help="replace the picture if it exists")
    return parser

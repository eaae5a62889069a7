"""What the commands that draw share: of which model, and by which settings of its sampler."""

import argparse
from typing import Any, get_args

from elt_lightning.checkpoints import shipped
from elt_lightning.commands.arguments import (
    FINITE_FROM_0,
    SEEDS,
    add_device_argument,
    add_weights_argument,
    device_of,
    whole,
)
from elt_lightning.errors import MOST
from elt_lightning.evaluation.drawing import Drawing, load
from elt_lightning.samplers.base import SETTINGS
from elt_lightning.samplers.loop_schedule import LoopShape


def add_model_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Describe which model draws, and where."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--ckpt_path", metavar="PATH", help="checkpoint, exported model, or a name on Hugging Face")
    source.add_argument("--model", metavar="NAME", help="model that comes along: elt models lists them")
    add_weights_argument(parser)
    add("--tokenizer_path", metavar="PATH", help="where the tokenizer's file lies, if it has moved")
    add_device_argument(parser)


def chosen_model(options: argparse.Namespace) -> Drawing:
    """Load the model that the command line asks for (UserError: there is no such model, file or device)."""
    source = options.ckpt_path if options.model is None else shipped.folder_of(options.model)
    return load(source, options.weights, options.tokenizer_path).to(device_of(options.device))


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the seed, and the settings of the sampler but for the loops."""
    add = parser.add_argument
    add("--guidance", type=FINITE_FROM_0, help="guidance scale; by default the model's")
    add("--exit_scale", type=FINITE_FROM_0, help="strength of guidance away from an early exit")
    add("--weak_loops", type=whole(1), help="loops of that exit")
    add("--tolerance", type=FINITE_FROM_0, help="end a sample's loop when it changes less than this")
    add("--loop_schedule", choices=get_args(LoopShape), help="loops over sampling steps")
    add(
        "--carry_state",
        choices=("true", "false"),
        help="begin each step's loop where the last one stopped; by default where the model has recall",
    )
    add("--steps", type=whole(1, MOST["steps"]), help="sampling steps; by default the model's")
    add("--seed", type=whole(0, SEEDS), default=0, help="decides every sample (default 0)")


def sampler_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is asked for, as :meth:`~elt_lightning.evaluation.drawing.Drawing.sampler` takes settings."""
    asked = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    return asked | ({"carry_state": options.carry_state == "true"} if "carry_state" in asked else {})

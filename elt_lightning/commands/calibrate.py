"""`elt calibrate`: find what a compute budget is best spent on: sampling steps, loops, guidance, a tolerance."""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from elt_lightning.commands.arguments import (
    FINITE_FROM_0,
    SEEDS,
    Parser,
    add_device_argument,
    add_weights_argument,
    choices_from,
    device_of,
    file_path,
    whole,
    wholes,
)
from elt_lightning.commands.train import quieten_libraries
from elt_lightning.errors import MOST, UserError
from elt_lightning.evaluation.calibration import FIRST_SAMPLE, Tried, picture_beside, search, write_plan
from elt_lightning.evaluation.plans import of_model
from elt_lightning.evaluation.report import in_words
from elt_lightning.evaluation.sweep import Sweep
from elt_lightning.evaluation.trained import Trained
from elt_lightning.model import AUTO_LOOPS
from elt_lightning.samplers.base import Sampler
from elt_lightning.samplers.loop_schedule import LoopShape

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def run(name: str, arguments: list[str]) -> None:
    """Try settings, and write the plan that the command line asks for.

    Raises:
        UserError: the command line or the checkpoint is wrong, or nothing fits into the budget.
    """
    options = build_parser().parse_args(arguments)
    picture = picture_beside(options.output)
    if options.output == picture:
        raise UserError(f"--output {options.output}: this is where the picture goes: choose another name for the plan")
    if not options.overwrite and (taken := [path for path in (options.output, picture) if path.exists()]):
        raise UserError(f"{taken[0]} exists: choose another --output, or add --overwrite")
    quieten_libraries()
    trained = Trained(options.ckpt_path, device_of(options.device), options.weights)
    module, data = trained.module, trained.data
    sampler, has_recall = module.sampler, module.network.has_recall
    grid = defaults(sampler.steps, module.max_loops, has_recall)
    grid |= {name: getattr(options, name) for name in grid if getattr(options, name) is not None}
    if not has_recall and (grid["tolerance"] or True in grid["carry_state"]):
        raise UserError("--tolerance and --carry_state true need a network with recall, and this one has none")
    sweep = Sweep(options.num_samples, options.batch_size, options.seed, num_pictures=0, first=FIRST_SAMPLE)

    def measure(loops: int, sampler: Sampler) -> Tried:
        row = trained.measure(loops, sampler, sweep)
        score = trained.score(row)
        print(f"{in_words(loops, row.settings)}: {row.macs_per_sample / 1e9:.3g} GMACs, {score:.4g}", flush=True)
        return Tried(loops, row.settings, row.mean_loops, row.macs_per_sample, score)

    left_out = defaultdict[str, set[Any]](set)

    def possible(loops: int, sampler: Sampler) -> bool:
        why = ""
        try:
            is_too_large = module.macs_per_sample(loops, sampler) > options.budget * full.macs_per_sample
            # What a tolerance makes of a setting, only trying it shows.
            if is_too_large and sampler.loop_schedule.tolerance is None:
                why = "beyond the budget"
        except ValueError:
            why = "without a loop beyond the weak exit"
        if why:
            left_out[why].add((loops, *sampler.settings().values()))
        return not why

    try:
        full = measure(module.max_loops, sampler)
        tried = search(sampler, grid, measure, possible, data.higher_is_better, AUTO_LOOPS * module.max_loops)
    except ValueError as error:
        raise UserError(str(error)) from error
    description = {
        "checkpoint": str(options.ckpt_path),
        "weights": trained.weights,
        "model": of_model(trained.recipe),
        "primary_metric": data.primary_metric,
        "higher_is_better": data.higher_is_better,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "first_sample": FIRST_SAMPLE,
        "train_loops": module.max_loops,
    }
    best = write_plan(options.output, description, tried, full, options.budget)
    others = "".join(f", {len(settings)} left out as {why}" for why, settings in left_out.items())
    table = Table(title=f"{len(tried)} settings tried{others}")
    for heading in ("", "setting", "mean loops", "GMACs/sample", "of the full recipe", data.primary_metric):
        table.add_column(heading)
    for what, each in (("full recipe", full), ("best", best)):
        setting, share = in_words(each.loops, each.settings), each.macs_per_sample / full.macs_per_sample
        gmacs = f"{each.macs_per_sample / 1e9:.3g}"
        table.add_row(what, setting, f"{each.mean_loops:.3g}", gmacs, f"{share:.3g}", f"{each.score:.4g}")
    Console(width=None if Console().is_terminal else 140).print(table)
    print(picture, options.output, sep="\n")


def defaults(steps: int, max_loops: int, has_recall: bool) -> dict[str, list[Any]]:
    """Return what is tried unless the command line says otherwise: {setting: values}."""
    furthest = max_loops * (2 if has_recall else 1)
    return {
        "steps": sorted({max(1, round(steps * share)) for share in (0.25, 0.5, 0.75, 1)}),
        "loops": sorted({*(count for count in LOOPS if count <= furthest), max_loops}),
        "carry_state": [False, True] if has_recall else [False],
        "guidance": [],
        "exit_scale": [0.25, 0.5, 1.0, 2.0],
        "weak_loops": [1, 2],
        "loop_schedule": ["falling", "rising"],
        "tolerance": [0.1, 0.03, 0.01] if has_recall else [],
    }


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt calibrate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument

    def numbers(text: str) -> list[float]:
        return [FINITE_FROM_0(part) for part in text.split(",")]

    def switches(text: str) -> list[bool]:
        return [part == "true" for part in choices_from("true", "false")(text)]

    add("--ckpt_path", required=True, metavar="PATH", help="checkpoint of elt fit")
    add("--budget", type=FINITE_FROM_0, required=True, metavar="0.5", help="share of the compute of its full recipe")
    add("--num_samples", type=whole(2), default=300, help="drawn for each setting (default 300)")
    add(
        "--steps",
        type=wholes(1, MOST["steps"]),
        metavar="6,12",
        help="sampling steps (default: a quarter of the model's, …, all)",
    )
    add(
        "--loops",
        type=wholes(1, MOST["loops"]),
        metavar="1,2,4",
        help="(default: up to L_max, with recall to twice that)",
    )
    add("--carry_state", type=switches, metavar="false,true", help="(default: both with recall)")
    add("--guidance", type=numbers, metavar="1,2", help="guidance scales (default: the model's)")
    add("--exit_scale", type=numbers, metavar="0.5,1", help="strengths of exit guidance (default 0.25,0.5,1,2)")
    add("--weak_loops", type=wholes(1), metavar="1,2", help="its weak exits (default 1,2)")
    add("--loop_schedule", type=choices_from(*get_args(LoopShape)), metavar="falling", help="(default falling,rising)")
    add("--tolerance", type=numbers, metavar="0.1,0.01", help="ends of loops (default 0.1,0.03,0.01 with recall)")
    add("--batch_size", type=whole(1), default=250, help="samples drawn at once (default 250)")
    add("--seed", type=whole(0, SEEDS), default=0, help="decides every sample (default 0)")
    add_weights_argument(parser)
    add_device_argument(parser)
    add("--output", type=file_path, default=Path("plan.json"), help="(default plan.json); pareto.png goes beside it")
    add("--overwrite", action="store_true", help="replace plan and picture if they exist")
    return parser

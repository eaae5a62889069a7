"""What loops do to the state: whether they settle, and how far a carried state is from settled.

python -m elt_lightning.reproduce.dynamics --ckpt_path "ILSD=runs/a/checkpoints/last.ckpt" \
    --ckpt_path "ILSD with recall=runs/b/checkpoints/last.ckpt" --output docs/results/dynamics

Three measurements, averaged over tokens and samples, the first two over sampling steps too:
- the relative update ‖h_l − h_(l−1)‖/‖h_l‖ of loop l;
- the cosine between the states of two tokens of a sample, which goes to 1 where tokens grow alike;
- with recall, for each sampling step, ‖s − s*‖/‖s*‖ of the carried state s that it begins from, where s* is what its
  loop settles at: the state after 32 loops from zero, whose own distance is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import status_of
from elt_lightning.commands.arguments import device_of
from elt_lightning.errors import UserError
from elt_lightning.evaluation.pictures import write_figure
from elt_lightning.files import write_json
from elt_lightning.model import ELTModel
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.reproduce.update_norms import EVERY_LOOP
from elt_lightning.training.loop_monitor import followed_loops, relative_distance

SETTLED = 32
"""Loops after which the state of a model with recall counts as settled, and up to which updates are followed."""

CARRIED_LOOPS = (1, 2, 4)
"""Loop counts of the sampling steps whose states are carried."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure checkpoints side by side, and write ``dynamics.json`` and ``dynamics.png``.

    Raises:
        UserError: a checkpoint cannot be read, or has no name.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ckpt_path", action="append", required=True, help="NAME=PATH of each checkpoint")
    parser.add_argument("--num", type=int, default=64, help="samples to average over (default 64)")
    parser.add_argument("--device", help="for example cuda:1; by default a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="decides every sample (default 0)")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    options = parser.parse_args(arguments)
    if options.num < 1:
        raise UserError("--num must be at least 1")
    found = {}
    for text in options.ckpt_path:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--ckpt_path takes NAME=PATH, not {text!r}")
        module = build_module(read_checkpoint(Path(path))).to(device_of(options.device))
        found[name] = measure(module, options.num, options.seed)
    content = {"num_samples": options.num, "seed": options.seed, "models": found}
    write_json(options.output / "dynamics.json", content, indent=None)
    write_figure(options.output / "dynamics.png", figure(found))
    print("\n".join(str(options.output / f"dynamics.{ending}") for ending in ("png", "json")))


def measure(module: ELTModel, num_samples: int, seed: int) -> dict[str, Any]:
    """Measure one model.

    Returns:
        ``update`` and ``cosine``, each a number for every loop; ``max_loops``; and with recall ``carried``: {loops: a
        distance for every sampling step but the first}.
    """
    index = torch.arange(num_samples, device=module.device)
    labels, seeds = index % module.num_classes, sample_seeds(seed, index)
    update, cosine = followed(module, labels, seeds)
    found: dict[str, Any] = {"max_loops": module.max_loops, "update": update, "cosine": cosine}
    if module.network.has_recall:
        found["carried"] = {loops: carried_distances(module, labels, seeds, loops) for loops in CARRIED_LOOPS}
    return found


def followed(module: ELTModel, labels: Tensor, seeds: Tensor) -> tuple[list[float], list[float]]:
    """Draw samples from zero with many loops: relative update and cosine between tokens after each."""
    sampler = module.sampler.with_settings(carry_state=False, **EVERY_LOOP)
    with followed_loops(module.network.backbone.layers) as (updates, cosines):
        module.sample(labels, SETTLED, seeds, sampler=sampler)
    means = [torch.stack(values).view(-1, SETTLED).mean(0).tolist() for values in (updates, cosines)]
    return means[0], means[1]


def carried_distances(module: ELTModel, labels: Tensor, seeds: Tensor, loops: int) -> list[float]:
    """Draw samples with the state carried: how far each step's first state is from what its loop settles at."""
    backbone, distances = module.network.backbone, []

    def before_pass(stack: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        embedded, condition, _, _, state = arguments
        if state is not None:
            _, settled = stack.forward(embedded, condition, SETTLED)  # without hooks
            distances.append(float(relative_distance(state, settled)))

    hook = backbone.register_forward_pre_hook(before_pass, with_kwargs=True)
    try:
        module.sample(labels, loops, seeds, sampler=module.sampler.with_settings(carry_state=True, **EVERY_LOOP))
    finally:
        hook.remove()
    return distances


def figure(models: dict[str, dict[str, Any]]) -> Figure:
    """Draw updates and cosines against loops, and distances of carried states against sampling steps."""
    drawing = Figure(figsize=(13, 3.6), dpi=120)
    updates, cosines, carried = drawing.subplots(1, 3)
    for name, found in models.items():
        for axes, what in ((updates, "update"), (cosines, "cosine")):
            axes.plot(range(1, len(found[what]) + 1), found[what], marker=".", label=name)
        for loops, distances in found.get("carried", {}).items():
            carried.plot(range(2, len(distances) + 2), distances, marker=".", label=f"{name}, L = {loops}")
    for axes, what in ((updates, "‖h_l − h_(l−1)‖ / ‖h_l‖"), (cosines, "cosine between tokens")):
        axes.set_xlabel("loop l")
        axes.set_ylabel(what)
        axes.axvline(next(iter(models.values()))["max_loops"], color="grey", linestyle=":", label="loops of training")
    updates.set_yscale("log")
    carried.axhline(1, color="grey", linestyle=":", label="from zero")
    carried.set_xlabel("sampling step")
    carried.set_ylabel("carried state: distance from settled")
    carried.set_ylim(bottom=0)
    for axes in (updates, cosines, carried):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    drawing.tight_layout()
    return drawing


if __name__ == "__main__":
    sys.exit(status_of(main, "dynamics"))

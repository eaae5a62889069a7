"""How much each loop changes the hidden state at each sampling step: the measurement of the paper's Figure 14.

python -m elt_lightning.reproduce.update_norms --ckpt_path runs/quickstart_0/checkpoints/last.ckpt
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import status_of
from elt_lightning.commands.arguments import device_of
from elt_lightning.errors import UserError
from elt_lightning.evaluation.pictures import write_figure
from elt_lightning.files import next_numbered, written_aside
from elt_lightning.model import ELTModel
from elt_lightning.processes.noise import sample_seeds

EVERY_LOOP: dict[str, Any] = {"loop_schedule": "constant", "tolerance": None}
"""Settings of a sampler by which every sampling step runs the loops that are asked for, whatever the model's are."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one checkpoint, and write ``update_norms.csv`` and ``update_norms.png``.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of elt fit")
    parser.add_argument("--loops", type=int, help="loops of every sampling step; by default the count of training")
    parser.add_argument("--num", type=int, default=200, help="samples to average over (default 200)")
    parser.add_argument("--batch_size", type=int, default=50, help="of these, drawn at once (default 50)")
    parser.add_argument("--device", help="for example cuda:1; by default a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="decides every sample (default 0)")
    parser.add_argument("--output", type=Path, help="folder; by default a new one beside the run's checkpoints")
    options = parser.parse_args(arguments)
    if options.num < 1 or options.batch_size < 1 or (options.loops is not None and options.loops < 1):
        raise UserError("--num, --batch_size and --loops must be at least 1")
    module = build_module(read_checkpoint(options.ckpt_path)).to(device_of(options.device))
    folder = options.output or next_numbered(options.ckpt_path.resolve().parent.parent, "update_norms")
    norms = update_norms(module, options.num, options.loops or module.max_loops, options.seed, options.batch_size)
    write_results(norms, module.max_loops, folder)


def update_norms(module: ELTModel, num_samples: int, loops: int, seed: int, batch_size: int = 50) -> Tensor:
    """Draw samples, and measure ‖h_r − h_(r−1)‖₂ for every loop r of every sampling step: (K, L) float32.

    The state h has D numbers for each token; its norm is averaged over tokens and samples, and where guidance acts over
    both of its branches. Prelude and coda layers are outside the loop and are left out. The module is in eval mode, of
    either family; sample i is of class i mod num_classes, and the seed decides it.
    """
    before: list[Tensor] = []
    norms: list[Tensor] = []

    def enter(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        before.append(arguments[0])

    def leave(layer: nn.Module, arguments: tuple[Tensor, ...], after: Tensor) -> None:
        norms.append((after - before.pop()).float().norm(dim=-1).mean())

    layers, sampler = module.network.backbone.layers, module.sampler.with_settings(**EVERY_LOOP)
    hooks = [layers.register_forward_pre_hook(enter), layers.register_forward_hook(leave)]
    total = torch.zeros(())
    try:
        for index in torch.arange(num_samples, device=module.device).split(batch_size):
            module.sample(index % module.num_classes, loops, sample_seeds(seed, index), sampler=sampler)
            # A sampler calls the network once a step.
            total = total + len(index) * torch.stack(norms).view(-1, loops).cpu()
            norms.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return total / num_samples


def write_results(norms: Tensor, train_loops: int, folder: Path) -> None:
    """Write the norms (K, L) as a table, a line for each step and loop, and as a figure."""
    lines = [(step, loop, norm) for step, row in enumerate(norms.tolist(), 1) for loop, norm in enumerate(row, 1)]
    with written_aside(folder / "update_norms.csv") as aside:
        pd.DataFrame(lines, columns=["step", "loop", "update_norm"]).to_csv(aside, index=False)
    write_figure(folder / "update_norms.png", figure(norms, train_loops))
    print("\n".join(str(folder / f"update_norms.{ending}") for ending in ("png", "csv")))


def figure(norms: Tensor, train_loops: int) -> Figure:
    """Draw the norms (K, L): a line for each loop against the sampling step; dashed beyond the loops of training."""
    drawing = Figure(figsize=(5, 3.5), dpi=150)
    axes = drawing.add_subplot()
    num_steps, num_loops = norms.shape
    for loop, values in enumerate(norms.T.tolist(), start=1):
        color = colormaps["viridis"]((loop - 1) / max(1, num_loops))
        style = "-" if loop <= train_loops else "--"
        axes.plot(range(1, num_steps + 1), values, style, color=color, marker=".", label=f"loop {loop}")
    axes.set_xlabel("sampling step")
    axes.set_ylabel("L2 norm of the update, mean over tokens")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return drawing


if __name__ == "__main__":
    sys.exit(status_of(main, "update_norms"))

"""`make ablation`: train every arm over several seeds, sweep each over loop counts, gather one JSON and one figure.

`make ablation-diffusion` does the same with another config, whose name is also that of the folders of runs and results.
Every run is an `elt fit` and an `elt test` in processes of their own. A run whose ``loops.json`` is there is not done
again, so that an interrupted ablation goes on where it stopped.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elt_lightning import __version__
from elt_lightning.errors import UserError
from elt_lightning.files import written_aside
from elt_lightning.reproduce.curves import read_curves

BEYOND_TRAINING = 2
"""Loop counts are measured up to so many above L_max."""


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: of its runs.
        label: in figure and table.
        num_layers: N.
        max_loops: L_max; 1 is unlooped.
        mode: of :class:`~elt_lightning.objectives.ilsd.ILSD`.
        settings: of its own, after those of all arms.
        test_loops: loop counts to measure, in place of 1 … L_max + 2.
    """

    name: str
    label: str
    num_layers: int
    max_loops: int
    mode: str
    settings: dict[str, Any] = field(default_factory=dict)
    test_loops: list[int] | None = None

    def loops(self) -> list[int]:
        """Loop counts to measure; a model that never looped is measured as it was trained."""
        every = [1] if self.max_loops == 1 else list(range(1, self.max_loops + BEYOND_TRAINING + 1))
        return self.test_loops or every

    def flags(self) -> list[str]:
        """What sets this arm apart on the command line of `elt fit`."""
        return [
            f"--model.network.init_args.num_layers={self.num_layers}",
            f"--model.distillation.max_loops={self.max_loops}",
            f"--model.distillation.mode={self.mode}",
            *(f"--{name}={value}" for name, value in self.settings.items()),
        ]


def main() -> None:
    """Run what is missing, then write ``ablation.json``, ``ablation.png`` and ``ablation.md``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("configs/ablation.yaml"))
    parser.add_argument("--runs", type=Path, help="where the runs lie; by default runs/<config>")
    parser.add_argument("--output", type=Path, help="folder of the results; by default docs/results/<config>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--override", nargs="*", default=[], metavar="NAME=VALUE", help="settings for every run")
    options = parser.parse_args()
    title = options.config.stem
    runs, output = options.runs or Path("runs", title), options.output or Path("docs/results", title)
    config = yaml.safe_load(options.config.read_text())
    overrides = dict(setting.split("=", 1) for setting in options.override)
    config["settings"] |= overrides
    arms = [Arm(name, **settings) for name, settings in config["arms"].items()]
    arms = [replace(arm, settings=arm.settings | overrides) for arm in arms]
    # Longest first, so that no core waits at the end.
    pairs = sorted(
        ((arm, seed) for seed in config["seeds"] for arm in arms), key=lambda p: -p[0].num_layers * p[0].max_loops
    )
    with ThreadPoolExecutor(options.jobs) as pool:
        lines = pool.map(lambda pair: run_arm(pair[0], pair[1], config, runs), pairs)
        for number, line in enumerate(lines, start=1):
            print(f"[{number}/{len(pairs)}] {line}", flush=True)
    summary = {"command": f"make {title.replace('_', '-')}"} | gather(arms, config, runs)
    write_results(summary, arms, output)


def run_arm(arm: Arm, seed: int, config: dict[str, Any], runs: Path) -> str:
    """Train and sweep one arm with one seed, unless it is done: a line that says what happened."""
    folder = runs / f"{arm.name}_seed{seed}"
    if (folder / "test" / "loops.json").is_file():
        return f"{folder}: done before"
    began = time.perf_counter()
    settings = [f"--{name}={value}" for name, value in config["settings"].items()]
    common = ["--config", config["base"], "--seed_everything", str(seed), *settings, *arm.flags()]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not (folder / "trained.json").is_file():
        unfinished = ["--ckpt_path", str(checkpoint)] if checkpoint.is_file() else []
        elt("fit", *common, "--run_dir", str(folder), *unfinished)
        with written_aside(folder / "trained.json") as aside:
            aside.write_text(json.dumps({"seconds": time.perf_counter() - began}))
    loops = ",".join(map(str, arm.loops()))
    elt("test", *common, "--run_dir", str(folder / "test"), "--ckpt_path", str(checkpoint), "--loops", loops)
    return f"{folder}: {time.perf_counter() - began:.0f} s"


def elt(*arguments: str) -> None:
    """Run `elt` with one thread.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "elt_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"elt {' '.join(arguments)} failed: {done.stderr[-2000:]}")


def gather(arms: list[Arm], config: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Read every run's ``loops.json`` into one summary: for each arm and loop count, each metric's value per seed."""
    summary: dict[str, Any] = {
        "config": config,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads_per_run": 1},
        "versions": {"elt_lightning": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "arms": {},
    }
    for arm in arms:
        folders = [runs / f"{arm.name}_seed{seed}" for seed in config["seeds"]]
        reports = [json.loads((folder / "test" / "loops.json").read_text()) for folder in folders]
        seconds = [json.loads((folder / "trained.json").read_text())["seconds"] for folder in folders]
        rows = []
        for same_loops in zip(*(report["rows"] for report in reports), strict=True):
            first = same_loops[0]
            metrics = {name: [row["metrics"][name]["mean"] for row in same_loops] for name in first["metrics"]}
            costs = {
                name: first[name]
                for name in ("loops", "effective_depth", "guidance", "params_backbone", "macs_per_sample")
            }
            rows.append(costs | {"metrics": metrics})
        held_out = held_out_losses(folders)
        summary["arms"][arm.name] = {
            "label": arm.label,
            "training_seconds": seconds,
            "rows": rows,
            "held_out": held_out,
        }
    summary |= {
        name: reports[0][name] for name in ("primary_metric", "higher_is_better", "num_samples", "sampling_steps")
    }
    return summary


def held_out_losses(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Read the held-out loss at each loop count over training: its steps, and for each step a value per seed."""
    seeds = [{name: dict(curve) for name, curve in read_curves(folder).items()} for folder in folders]
    losses = {}
    for name in (name for name in seeds[0] if name.startswith("val/loss@")):
        steps = sorted(set.intersection(*(set(curves[name]) for curves in seeds)))
        losses[name] = {"steps": steps, "values": [[curves[name][step] for curves in seeds] for step in steps]}
    return losses


def write_results(summary: dict[str, Any], arms: list[Arm], folder: Path) -> None:
    """Write the summary, its figure and its table."""
    with written_aside(folder / "ablation.json") as aside:
        aside.write_text(json.dumps(summary, indent=1) + "\n")
    metrics = summary["config"].get("metrics", [summary["primary_metric"]])
    with written_aside(folder / "ablation.png") as aside:
        figure(summary, arms, metrics).savefig(aside, bbox_inches="tight")
    with written_aside(folder / "ablation.md") as aside:
        aside.write_text("\n".join(table(summary, arms, metric) for metric in metrics))
    print("\n".join(str(folder / f"ablation.{ending}") for ending in ("png", "md", "json")))


def figure(summary: dict[str, Any], arms: list[Arm], metrics: list[str]) -> Figure:
    """Draw metrics side by side against the loop count."""
    drawing = Figure(figsize=(7 * len(metrics), 4.5), dpi=150)
    for axes, metric in zip(drawing.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        draw(axes, summary, arms, metric)
    return drawing


def draw(axes: Axes, summary: dict[str, Any], arms: list[Arm], metric: str) -> None:
    """Draw one metric: a line for each looped arm, a level for each unlooped one."""
    for arm in arms:
        rows = summary["arms"][arm.name]["rows"]
        values = [row["metrics"][metric] for row in rows]  # loop counts, seeds
        means, loops = [mean(seeds) for seeds in values], [row["loops"] for row in rows]
        if arm.max_loops == 1:
            axes.axhline(means[0], color="gray", linestyle=":", linewidth=1)
            axes.annotate(
                arm.label,
                (0.99, means[0]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
                color="gray",
            )
        else:
            (line,) = axes.plot(loops, means, marker="o", label=arm.label)
            for seed in zip(*values, strict=True):
                axes.plot(loops, seed, marker=".", linestyle="none", color=line.get_color(), alpha=0.4)
            axes.axvline(arm.max_loops, color="black", linestyle="--", linewidth=0.5, alpha=0.3)
    axes.set_xlabel("loops at inference (dashed: the loop count of training)")
    axes.set_ylabel(f"{metric}: mean, and each of {len(summary['config']['seeds'])} seeds (dots)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def table(summary: dict[str, Any], arms: list[Arm], metric: str) -> str:
    """Write a metric as a Markdown table: arms down, loop counts across."""
    columns = sorted({row["loops"] for arm in arms for row in summary["arms"][arm.name]["rows"]})
    is_distance = metric.startswith("fd_")
    counts = " | ".join(f"L = {loops}" for loops in columns)
    lines = [
        f"| {metric}{'' if is_distance else ', %'} | backbone parameters | {counts} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for arm in arms:
        rows = {row["loops"]: row for row in summary["arms"][arm.name]["rows"]}
        write = with_spread if is_distance else percentage
        cells = [write(rows[loops]["metrics"][metric]) if loops in rows else "" for loops in columns]
        lines.append(f"| {arm.label} | {next(iter(rows.values()))['params_backbone']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def percentage(values: list[float]) -> str:
    """Write mean and sample standard deviation over seeds in percent."""
    return with_spread([100 * value for value in values], ".1f")


def with_spread(values: list[float], form: str = ".3g") -> str:
    """Write mean and sample standard deviation over seeds."""
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"ablation: error: {error}")

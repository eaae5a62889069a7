"""`make ablation`: train every arm over several seeds, sweep each over loop counts, gather one JSON and one figure.

`make NAME` does the same with another file of ``experiments/``, whose name is also that of the folders of
runs and results. It says which config every arm trains (``config``), with which ``settings`` and ``seeds``, the
``arms``, which ``metrics`` to show, and under ``prepare`` the module, with its flags, that makes data which are not
there, where there is a run to do.

Every run is an `elt fit` and an `elt test`, each in its own process. Its measurements are one file below the results,
``runs/<arm>_seed<seed>.json``. A run that has one is not done again, so that an ablation may be interrupted, and may go
on in another clone. The summary is of the seeds that every arm has.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from elt_lightning import __version__
from elt_lightning.cli import status_of
from elt_lightning.commands.settings import config_and_bases
from elt_lightning.errors import UserError
from elt_lightning.evaluation.comparison import Curve, draw, table
from elt_lightning.evaluation.pictures import write_figure
from elt_lightning.files import write_json, write_text
from elt_lightning.reproduce.curves import read_curves

BEYOND_TRAINING = 2
"""Loop counts are measured up to this many above L_max."""

TRAINED = "trained.json"
"""What a run has once it is trained, with the seconds that took."""

DIVERSITY = "diversity"
"""In a record, and in the folder of a run with recall: how varied samples at L_max are, from zero and carried."""

LENGTHS = ("trainer.max_steps", "trainer.val_check_interval")
"""Settings that say how long an arm trains."""

COSTS = ("loops", "effective_depth", "guidance", "params_backbone", "macs_per_sample", "carry_state")
"""What does not depend on the seed in a row of ``loops.json``; records made before recall lack the last."""


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str  # of its runs
    label: str  # in figure and table
    num_layers: int  # N
    max_loops: int  # L_max; 1 is unlooped
    mode: str  # of `ILSD`
    settings: dict[str, Any] = field(default_factory=dict)  # this arm's, which come after those of all arms
    test_loops: list[int] | None = None  # loop counts to measure, in place of 1 … L_max + 2
    recall: bool = False  # every loop reads the input again; measured both from zero and with the state carried
    begins_at: str | None = None  # the unlooped arm whose model `elt loop` makes this one's beginning of
    init: str = "average"  # of `elt loop`
    taught: bool = False  # that model is the outer teacher

    def loops(self) -> list[int]:
        """Return the loop counts to measure; a model that never looped is measured as it was trained."""
        every = [1] if self.max_loops == 1 else list(range(1, self.max_loops + BEYOND_TRAINING + 1))
        return self.test_loops or every

    def flags(self) -> list[str]:
        """Return what sets this arm apart on the command line of `elt fit`."""
        return [
            f"--model.network.init_args.num_layers={self.num_layers}",
            f"--model.distillation.max_loops={self.max_loops}",
            f"--model.distillation.mode={self.mode}",
            *(["--model.network.init_args.recall=true"] if self.recall else []),
            *(f"--{name}={value}" for name, value in self.settings.items()),
        ]

    def loop_flags(self) -> list[str]:
        """Return how `elt loop` makes the beginning, where it does not begin from nothing."""
        sizes = ["--layers", str(self.num_layers), "--loops", str(self.max_loops), "--init", self.init]
        return [*sizes, *(["--recall"] if self.recall else [])] if self.begins_at else []

    def sweep(self) -> list[str]:
        """Return what is swept, as flags of `elt test`."""
        carried = ["--carry_state", "false,true"] if self.recall else []
        return ["--loops", ",".join(map(str, self.loops())), *carried]


def main() -> None:
    """Run what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("experiments/ablation.yaml"))
    parser.add_argument("--runs", type=Path, help="where the runs lie; by default runs/<config>")
    parser.add_argument("--output", type=Path, help="folder of the results; by default docs/results/<config>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument(
        "--override", nargs="*", type=setting, default=[], metavar="NAME=VALUE", help="settings for every run"
    )
    parser.add_argument("--gather", action="store_true", help="run nothing, lay out the seeds that are whole")
    options = parser.parse_args()
    title = options.config.stem
    runs, output = options.runs or Path("runs", title), options.output or Path("docs/results", title)
    config = read_experiment(options.config)
    overrides = dict(options.override)
    config["settings"] |= overrides
    arms = [replace(arm, settings=arm.settings | overrides) for arm in arms_of(config)]
    # Seed by seed, so that an interrupted ablation has whole seeds; longest first, so that no core waits at the end.
    # What others begin from is the first of a seed.
    longest_first = sorted(arms, key=lambda arm: (arm.begins_at is not None, -arm.num_layers * arm.max_loops))
    pairs = [(seed, arm) for seed in config["seeds"] for arm in longest_first if not options.gather]
    if "prepare" in config and not all(record_path(output, arm, seed).is_file() for seed, arm in pairs):
        prepare(config["prepare"])
    with ThreadPoolExecutor(options.jobs) as pool:
        begun: dict[tuple[int, str], Future[str]] = {}
        for seed, arm in pairs:
            after = begun.get((seed, arm.begins_at)) if arm.begins_at else None
            begun[seed, arm.name] = pool.submit(run_arm, arm, seed, config, runs, output, after)
        runs_to_do = list(begun.values())
        try:
            for number, run in enumerate(as_completed(runs_to_do), start=1):
                print(f"[{number}/{len(pairs)}] {run.result()}", flush=True)
        finally:  # after an error nothing new is begun; finished runs are still laid out
            pool.shutdown(wait=False, cancel_futures=True)
            write_results(title, config, arms, output)
    print("\n".join(str(output / f"ablation.{ending}") for ending in ("png", "md", "json")))


def read_experiment(path: Path) -> dict[str, Any]:
    """Read a file of ``experiments/`` (UserError: it lacks a section, or has one that nothing reads)."""
    config = yaml.safe_load(path.read_text())
    needed, sections = {"config", "seeds", "settings", "arms"}, set(config) if isinstance(config, dict) else set()
    for problem, names in (
        ("lacks", needed - sections),
        ("may not have", sections - needed - {"metrics", "prepare", "test_loops"}),
    ):
        if names:
            raise UserError(f"{path}, an experiment of `make ablation`, {problem} {', '.join(sorted(map(str, names)))}")
    return dict(config)


def arms_of(config: dict[str, Any]) -> list[Arm]:
    """Return the arms of an experiment (UserError: one has a setting that arms do not have, or lacks one)."""
    try:
        shared = {"test_loops": config.get("test_loops")}
        arms = [Arm(name, **(shared | settings)) for name, settings in config["arms"].items()]
    except (TypeError, AttributeError) as error:
        raise UserError(f"an arm of the experiment is not as it should be: {error}") from error
    for arm in arms:
        if arm.begins_at not in (None, *config["arms"]):
            raise UserError(f"the arm {arm.name} begins at {arm.begins_at}, which is no arm of the experiment")
        idle = {"init", "taught"} & config["arms"][arm.name].keys()
        if idle and arm.begins_at is None:
            raise UserError(f"the arm {arm.name} has {', '.join(sorted(idle))}, but no begins_at")
    return arms


def prepare(program: str) -> None:
    """Make the data: run a module of the package with its flags (UserError: it failed; its own line comes first)."""
    if subprocess.run([sys.executable, "-m", *shlex.split(program)], check=False).returncode:
        raise UserError(f"the data could not be made: python -m {program}")


def setting(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def run_arm(
    arm: Arm, seed: int, config: dict[str, Any], runs: Path, output: Path, after: Future[str] | None = None
) -> str:
    """Train and sweep one arm with one seed, unless it is done: a line that says what happened.

    Args:
        arm: what is trained.
        seed: of everything.
        config: of the experiment.
        runs: folder of the runs.
        output: folder of the results.
        after: the run that this one begins from, and so waits for.

    Raises:
        UserError: it was done with other settings, or the run that it begins from is not here.
    """
    folder, record = runs / f"{arm.name}_seed{seed}", record_path(output, arm, seed)
    settings = [f"--{name}={value}" for name, value in config["settings"].items()]
    flags = ["--config", config["config"], "--seed_everything", str(seed), *settings, *arm.flags()]
    command = [*flags, *arm.sweep()]
    begins = [arm.begins_at, *arm.loop_flags(), *(["taught"] if arm.taught else [])] if arm.begins_at else []
    base = settings_in(Path(config["config"]))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if record.is_file():
        done = read_record(record)
        if (done["command"], done["base_sha256"]) != ([*command, *begins], base):
            raise UserError(f"{record} was measured with other settings: delete it and {folder} to measure again")
        if not arm.recall or DIVERSITY in done or not checkpoint.is_file():
            return f"{record}: done before"
    began = time.perf_counter()
    if not is_trained(folder):
        unfinished = ["--ckpt_path", str(checkpoint)] if checkpoint.is_file() else []
        beginning = begin(arm, runs, seed, folder, after) if begins and not unfinished else []
        began = time.perf_counter()  # without waiting for the run that it begins from
        elt("fit", *flags, "--run_dir", str(folder), *unfinished, *beginning)
        seconds = None if unfinished else time.perf_counter() - began  # of the whole training, or unknown
        write_text(folder / TRAINED, json.dumps({"seconds": seconds}))
    if not (folder / "test" / "loops.json").is_file():
        elt("test", *command, "--run_dir", str(folder / "test"), "--ckpt_path", str(checkpoint))
    if arm.recall and not (folder / DIVERSITY / "loops.json").is_file():
        both = ["--loops", str(arm.max_loops), "--carry_state", "false,true", "--diversity"]
        elt("test", *flags, *both, "--run_dir", str(folder / DIVERSITY), "--ckpt_path", str(checkpoint))
    write_record(record, [*command, *begins], base, folder)
    return f"{record}: {time.perf_counter() - began:.0f} s"


def is_trained(folder: Path) -> bool:
    """Return whether a run's training came to its end; one that was stopped has a checkpoint too."""
    return (folder / TRAINED).is_file()


def begin(arm: Arm, runs: Path, seed: int, folder: Path, after: Future[str] | None) -> list[str]:
    """Make what an arm begins from; return the flags of `elt fit` (UserError: the unlooped run is not here)."""
    if after is not None:
        after.result()
    original = runs / f"{arm.begins_at}_seed{seed}" / "checkpoints" / "last.ckpt"
    if not original.is_file():
        raise UserError(f"{arm.name} begins from {original}, which is not here: measure {arm.begins_at} again")
    made = folder / "beginning"
    elt("loop", "--from", str(original), *arm.loop_flags(), "--output", str(made), "--overwrite")
    return ["--init_from", str(made), *([f"--model.outer_teacher.path={original}"] if arm.taught else [])]


def record_path(output: Path, arm: Arm, seed: int) -> Path:
    """Return where a run's measurements are."""
    return output / "runs" / f"{arm.name}_seed{seed}.json"


def read_record(path: Path) -> dict[str, Any]:
    """Read what a run measured (UserError: the file is damaged)."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        lacking = {"command", "base_sha256", "rows", "val", "versions", "machine"} - record.keys()
        if lacking:
            raise ValueError(f"it has no {', '.join(sorted(lacking))}")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} was not written by `make ablation`: {error}") from error
    return record


def settings_in(config: Path) -> str:
    """Hash what a config and its bases set, comments and layout aside."""
    with TemporaryDirectory() as scratch:
        layers = [yaml.safe_load(path.read_text()) for path in config_and_bases(config, Path(scratch))]
    return hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, command: list[str], base: str, folder: Path) -> None:
    """Write what a run measured, and on what: its sweep without the samples' settings, its held-out losses."""
    report = json.loads((folder / "test" / "loops.json").read_text())
    kept = ("primary_metric", "higher_is_better", "num_samples", "sampling_steps")
    diversity = folder / DIVERSITY / "loops.json"
    record = {
        "command": command,
        "base_sha256": base,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads_per_run": 1},
        "versions": {"elt_lightning": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "training_seconds": json.loads((folder / TRAINED).read_text())["seconds"],
        **{name: report[name] for name in kept},
        "rows": rows_of(report),
        **({DIVERSITY: rows_of(json.loads(diversity.read_text()))} if diversity.is_file() else {}),
        "val": {name: curve for name, curve in read_curves(folder).items() if name.startswith("val/loss@")},
    }
    write_json(path, record, indent=None)


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a sweep as records keep them."""
    return [
        {name: row[name] for name in COSTS} | {"metrics": {name: m["mean"] for name, m in row["metrics"].items()}}
        for row in report["rows"]
    ]


def elt(*arguments: str) -> None:
    """Run `elt` with one thread (UserError: it failed; with the end of its output)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "elt_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"elt {' '.join(arguments)} failed: {done.stderr[-2000:]}")


def gather(arms: list[Arm], config: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """Gather the records: for each arm and loop count, each metric's value per seed. None without a whole seed."""
    seeds = [seed for seed in config["seeds"] if all(record_path(output, arm, seed).is_file() for arm in arms)]
    if not seeds:
        return None
    summary: dict[str, Any] = {"config": config | {"seeds": seeds}, "arms": {}}
    for arm in arms:
        records = [read_record(record_path(output, arm, seed)) for seed in seeds]
        varied = [record[DIVERSITY] for record in records if DIVERSITY in record]
        summary["arms"][arm.name] = {
            "label": arm.label,
            "training_seconds": [record["training_seconds"] for record in records],
            "rows": side_by_side([record["rows"] for record in records]),
            **({DIVERSITY: side_by_side(varied)} if varied else {}),  # of the seeds that have it
            "val": val_losses([record["val"] for record in records]),
        }
    shared = ("machine", "versions", "primary_metric", "higher_is_better", "num_samples", "sampling_steps")
    return summary | {name: records[-1][name] for name in shared}


def side_by_side(seeds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of several seeds: each metric's value per seed."""
    rows = []
    for same_loops in zip(*seeds, strict=True):
        metrics = {name: [row["metrics"][name] for row in same_loops] for name in same_loops[0]["metrics"]}
        rows.append({name: same_loops[0][name] for name in COSTS if name in same_loops[0]} | {"metrics": metrics})
    return rows


def val_losses(seeds: list[dict[str, list[tuple[int, float]]]]) -> dict[str, dict[str, Any]]:
    """Lay out the held-out loss at each loop count over training: its steps, and for each step a value per seed."""
    losses = {}
    for name in seeds[0]:
        curves = [dict(seed[name]) for seed in seeds]
        steps = sorted(set.intersection(*map(set, curves)))
        losses[name] = {"steps": steps, "values": [[curve[step] for curve in curves] for step in steps]}
    return losses


def write_results(title: str, config: dict[str, Any], arms: list[Arm], folder: Path) -> None:
    """Write ``ablation.json``, ``ablation.png`` and ``ablation.md`` of the seeds that are whole, if there are any."""
    gathered = gather(arms, config, folder)
    if gathered is None:
        return
    summary = {"command": f"make {title.replace('_', '-')}"} | gathered
    write_json(folder / "ablation.json", summary)
    metrics = summary["config"].get("metrics", [summary["primary_metric"]])
    write_figure(folder / "ablation.png", figure(summary, arms, metrics))
    tables = []
    for name in metrics:
        measured, in_percent = curves(summary, arms, name), not name.startswith("fd_")
        over = over_steps(measured, summary["config"])
        tables += [table(over, f"{name} at L_max", in_percent, "steps")] if over else []
        tables.append(table([curve for _, curve in measured], name, in_percent))
    write_text(folder / "ablation.md", "\n".join(tables))


def figure(summary: dict[str, Any], arms: list[Arm], metrics: list[str]) -> Figure:
    """Draw metrics side by side against the loop count, or where arms differ in nothing but steps, against those."""
    drawing = Figure(figsize=(7 * len(metrics), 4.5), dpi=150)
    for axes, metric in zip(drawing.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        measured = curves(summary, arms, metric)
        if over := over_steps(measured, summary["config"]):
            draw(axes, over, "steps")
        else:
            draw(axes, [curve for _, curve in measured])
        seeds = len(summary["config"]["seeds"])
        axes.set_ylabel(metric if seeds == 1 else f"{metric}: mean, and each of {seeds} seeds (dots)")
    return drawing


def curves(summary: dict[str, Any], arms: list[Arm], metric: str) -> list[tuple[Arm, Curve]]:
    """Return what was measured of the arms over loop counts: from zero, and carried where that was measured."""
    found = []
    for arm in arms:
        for carried in (False, True):
            rows = [row for row in summary["arms"][arm.name]["rows"] if bool(row.get("carry_state")) == carried]
            if rows:
                loops = [row["loops"] for row in rows]
                curve = Curve(
                    f"{arm.label}, carried" if carried else arm.label,
                    pd.DataFrame([row["metrics"][metric] for row in rows], index=loops),
                    pd.Series([row["macs_per_sample"] for row in rows], index=loops),
                    arm.max_loops,
                    rows[0]["params_backbone"],
                )
                found.append((arm, curve))
    return found


def over_steps(measured: list[tuple[Arm, Curve]], config: dict[str, Any]) -> list[Curve]:
    """Return the scores at L_max over steps of training; nothing where no two arms differ in their steps alone.

    Arms that were not measured at L_max are left out, and are in the table over loops alone. What arms that
    differ in steps are called is what their labels say before the last comma.
    """
    alike: dict[str, dict[int, tuple[Arm, Curve]]] = {}
    for arm, curve in measured:
        if arm.max_loops not in curve.scores.index:
            continue
        rest = {name: value for name, value in arm.settings.items() if name not in LENGTHS}
        way = f"{replace(arm, name='', label='', settings=rest)}, {curve.label.removeprefix(arm.label)}"
        steps = int((config["settings"] | arm.settings).get("trainer.max_steps", 0))
        alike.setdefault(way, {})[steps] = arm, curve
    if max(map(len, alike.values()), default=0) <= 1:
        return []
    found = []
    for group in alike.values():
        scores = {steps: curve.scores.loc[arm.max_loops] for steps, (arm, curve) in sorted(group.items())}
        arm, like = next(iter(group.values()))
        name = arm.label if len(group) == 1 else arm.label.rpartition(", ")[0]
        label = name + like.label.removeprefix(arm.label)
        found.append(replace(like, label=label, scores=pd.DataFrame(scores).T))
    return found


if __name__ == "__main__":
    sys.exit(status_of(main, "ablation"))

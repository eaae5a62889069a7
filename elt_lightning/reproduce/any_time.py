"""`make any-time`: quality against compute, of runs that `make recall` and its like have trained, at many settings.

Every checkpoint is measured at the settings that the grids of ``experiments/any_time.yaml`` name for its recipe. The
measurements of one checkpoint are one file below the results, ``runs/<testbed>_<recipe>_seed<seed>.json``, with a
record for each setting, written when it is measured: what has a record is not measured again. Runs that are not there
yet are named and left out. ``any_time_results.py`` lays the records out.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from elt_lightning.cli import status_of
from elt_lightning.commands.train import quieten_libraries
from elt_lightning.errors import UserError
from elt_lightning.evaluation.sweep import Sweep, swept_settings
from elt_lightning.evaluation.trained import Trained
from elt_lightning.files import write_json
from elt_lightning.model import AUTO_LOOPS
from elt_lightning.reproduce.ablation import is_trained
from elt_lightning.reproduce.any_time_results import key_of, records_path, write_results
from elt_lightning.reproduce.commands import last_checkpoint
from elt_lightning.samplers.base import Sampler

SECTIONS = {"seeds", "paper", "ours", "recipes", "grids", "testbeds"}


@dataclass(frozen=True)
class Run:
    """One checkpoint, and what is to be measured of it."""

    name: str  # of its records: testbed, recipe and seed
    checkpoint: Path
    grids: list[dict[str, list[Any]]]  # every combination of each; steps are shares of the model's own
    num_samples: int
    records: Path


def main() -> None:
    """Measure what is missing, and write the results."""
    parser = argparse.ArgumentParser(prog="any_time", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", type=Path, default=Path("experiments/any_time.yaml"))
    add("--runs", type=Path, default=Path("runs"), help="where runs/<experiment>/<arm>_seed<seed> lie")
    add("--output", type=Path, help="folder of the results; by default docs/results/<config>")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="checkpoints measured at once, one thread each")
    add("--testbeds", help="comma-separated: these alone")
    add("--num_samples", type=int, help="in place of what the testbeds say")
    options = parser.parse_args()
    config, output = read_config(options.config), options.output or Path("docs/results", options.config.stem)
    chosen = options.testbeds.split(",") if options.testbeds else list(config["testbeds"])
    if unknown := set(chosen) - set(config["testbeds"]):
        raise UserError(f"there is no testbed {', '.join(sorted(unknown))}: there are {', '.join(config['testbeds'])}")
    runs = list(runs_of(config, chosen, options.runs, output, options.num_samples))
    missing = [run for run in runs if not (run.checkpoint.exists() and is_trained(run.checkpoint.parents[1]))]
    if missing:
        print(f"not trained yet, and left out: {', '.join(str(run.checkpoint.parents[1]) for run in missing)}")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(measure, run) for run in runs if run not in missing]
        try:
            for done, future in enumerate(as_completed(work), start=1):
                print(f"[{done}/{len(work)}] {future.result()}", flush=True)
        except (SystemExit, KeyboardInterrupt):  # SIGTERM may have come to this process alone
            for worker in active_children():
                worker.terminate()
            raise
        finally:  # what was measured is laid out, after an error too
            pool.shutdown(wait=True, cancel_futures=True)
            write_results(config, output)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``any_time.yaml`` (UserError: it lacks a section, or has one that nothing reads)."""
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or set(config) != SECTIONS:
        raise UserError(f"{path} must have the sections {', '.join(sorted(SECTIONS))}")
    return config


def runs_of(
    config: dict[str, Any], testbeds: Sequence[str], runs: Path, output: Path, num_samples: int | None
) -> Iterator[Run]:
    """Yield the checkpoints of some testbeds, seed by seed."""
    for seed, name in product(config["seeds"], testbeds):
        testbed = config["testbeds"][name]
        if unknown := set(testbed.get("grids", ())) - set(config["grids"]):
            raise UserError(f"the testbed {name} takes grids that are not there: {', '.join(sorted(unknown))}")
        for recipe, described in config["recipes"].items():
            run = f"{recipe}_seed{seed}"
            yield Run(
                f"{name}_{run}",
                last_checkpoint(runs / testbed["runs"] / run),
                [config["grids"][grid] for grid in described["grids"] if grid in testbed.get("grids", config["grids"])],
                num_samples or testbed["num_samples"],
                records_path(output, name, recipe, seed),
            )


def measure(run: Run) -> str:
    """Measure what a checkpoint lacks, a record after the other: a line that says how many were new.

    Raises:
        UserError: it was measured with another number of samples, or trained further since.
    """
    torch.set_num_threads(1)
    quieten_libraries()
    trained = Trained(run.checkpoint, torch.device("cpu"))
    module = trained.module
    about = {
        "num_samples": run.num_samples,
        "train_steps": trained.train_steps,
        "train_loops": module.max_loops,
        "sampling_steps": module.sampler.steps,
        "guidance": module.sampler.guidance.scale,
        "primary_metric": trained.data.primary_metric,
        "higher_is_better": trained.data.higher_is_better,
    }
    content: dict[str, Any] = json.loads(run.records.read_text()) if run.records.is_file() else about | {"records": []}
    if {name: content.get(name) for name in about} != about:
        raise UserError(f"{run.records} was measured of other weights, or otherwise: delete it to measure again")
    done = {key_of(record) for record in content["records"]}
    new = 0
    for loops, sampler in settings_of(run.grids, module.sampler, module.max_loops, module.network.has_recall):
        if (loops, *sampler.settings().values()) in done:
            continue
        row = trained.measure(loops, sampler, Sweep(run.num_samples, 250, seed=0, num_pictures=0))
        record = {"loops": loops, **row.settings, "mean_loops": row.mean_loops, "macs_per_sample": row.macs_per_sample}
        record |= {"samples_per_second": row.samples_per_second}
        content["records"].append(record | {"metrics": {name: row.mean(name) for name in row.metrics}})
        write_json(run.records, content)
        new += 1
    return f"{run.name}: {new} settings measured, {len(done)} before"


def settings_of(
    grids: Sequence[dict[str, list[Any]]], sampler: Sampler, max_loops: int, has_recall: bool
) -> list[tuple[int, Sampler]]:
    """List loop counts and samplers of some grids, each once; what `elt test` would leave out is left out."""
    found: dict[tuple[Any, ...], tuple[int, Sampler]] = {}
    for grid in grids:
        loops = [AUTO_LOOPS * max_loops if count == "auto" else count for count in grid["loops"]]
        swept = {name: values for name, values in grid.items() if name != "loops"}
        swept["steps"] = [max(1, round(share * sampler.steps)) for share in grid["steps"]]
        for count, changed in swept_settings(loops, sampler, swept, has_recall)[0]:
            found.setdefault((count, *changed.settings().values()), (count, changed))
    return list(found.values())


if __name__ == "__main__":
    sys.exit(status_of(main, "any_time"))

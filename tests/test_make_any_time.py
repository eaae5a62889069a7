"""`make any-time`: records setting by setting, which another call goes on with, and what is compared at last."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from elt_lightning.errors import UserError
from elt_lightning.reproduce import any_time
from elt_lightning.reproduce.ablation import TRAINED
from elt_lightning.reproduce.claims import any_time_section

CONFIG: dict[str, Any] = {
    "seeds": [0],
    "paper": "ilsd",
    "ours": ["recall_ilsd"],
    "recipes": {
        "ilsd": {"label": "ILSD", "grids": ["plain", "exits"]},
        "recall_ilsd": {"label": "with recall", "grids": ["plain"]},
    },
    "grids": {
        "plain": {"steps": [0.34, 1.0], "loops": [1, 4]},
        "exits": {"steps": [1.0], "loops": [1, 4], "exit_scale": [0, 0.5], "weak_loops": [1]},
    },
    "testbeds": {"squares": {"runs": "recall", "num_samples": 4, "recorded": {"recall": ["vanilla"]}}},
}


def test_a_checkpoint_is_measured_setting_by_setting_and_only_once(
    small_squares: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    run = tmp_path / "recall" / "ilsd_seed0" / "checkpoints" / "last.ckpt"
    run.parent.mkdir(parents=True)
    shutil.copy(small_squares, run)
    runs = list(any_time.runs_of(CONFIG, ["squares"], tmp_path, tmp_path / "results", None))
    assert [each.checkpoint.is_file() for each in runs] == [True, False]
    assert any_time.measure(runs[0]) == "squares_ilsd_seed0: 5 settings measured, 0 before"
    content = json.loads(runs[0].records.read_text())
    settings = [tuple(each[name] for name in ("loops", "steps", "exit_scale")) for each in content["records"]]
    assert settings == [(1, 1, 0), (1, 3, 0), (4, 1, 0), (4, 3, 0), (4, 3, 0.5)]
    lost = content["records"].pop(2)
    runs[0].records.write_text(json.dumps(content))
    assert any_time.measure(runs[0]) == "squares_ilsd_seed0: 1 settings measured, 4 before"
    again = json.loads(runs[0].records.read_text())["records"][-1]
    assert {**again, "samples_per_second": 0} == {**lost, "samples_per_second": 0}
    runs[0].records.write_text(json.dumps(content | {"num_samples": 5}))
    with pytest.raises(UserError, match="delete it to measure again"):
        any_time.measure(runs[0])


def test_a_testbed_takes_the_grids_it_names_and_no_unknown_one(tmp_path: Path) -> None:
    testbed = CONFIG["testbeds"]["squares"]
    fewer = CONFIG | {"testbeds": {"squares": testbed | {"grids": ["plain"]}}}
    plain = CONFIG["grids"]["plain"]
    assert [run.grids for run in any_time.runs_of(fewer, ["squares"], tmp_path, tmp_path, None)] == [[plain], [plain]]
    wrong = CONFIG | {"testbeds": {"squares": testbed | {"grids": ["plian"]}}}
    with pytest.raises(UserError, match="squares takes grids that are not there: plian"):
        list(any_time.runs_of(wrong, ["squares"], tmp_path, tmp_path, None))


def test_the_summary_compares_at_equal_quality_and_at_equal_compute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of records made by hand: means over seeds, the cheapest that is as good, the best that costs no more."""
    setting = {"carry_state": False, "guidance": 1.0, "exit_scale": 0, "weak_loops": None}
    setting |= {"loop_schedule": "constant", "tolerance": None}
    about = {"num_samples": 4, "train_steps": 6, "train_loops": 4, "sampling_steps": 3, "primary_metric": "valid"}
    about["guidance"] = 1.0
    scores = {"ilsd": {1: (0.2, 0.4), 4: (0.6, 0.8)}, "recall_ilsd": {1: (0.5, 0.6), 2: (0.8, 0.7), 4: (0.9, 1.0)}}
    for recipe, by_loops in scores.items():
        for seed in (0, 1):
            records = [
                {"loops": loops, "steps": 3, **setting, "mean_loops": loops, "macs_per_sample": 100 * loops}
                | {"metrics": {"valid": values[seed]}}
                for loops, values in by_loops.items()
            ]
            if recipe == "ilsd":  # at L_max too, away from an exit, one of them at more than the compute of L_max
                guided = records[-1] | {"weak_loops": 1}
                for scale, macs, score in ((0.5, 410, 0.75), (1.0, 410, 0.65), (2.0, 500, 0.99)):
                    changed = {"exit_scale": scale, "macs_per_sample": macs, "metrics": {"valid": score}}
                    records.append(guided | changed)
            path = any_time.records_path(tmp_path / "any_time", "squares", recipe, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(about | {"higher_is_better": True, "records": records}))
    (tmp_path / "any_time.yaml").write_text(yaml.safe_dump(CONFIG | {"seeds": [0, 1, 2]}))
    stopped = tmp_path / "recall" / "ilsd_seed2" / "checkpoints" / "last.ckpt"
    stopped.parent.mkdir(parents=True)
    stopped.touch()  # without the mark of a training that came to its end
    flags = ["--config", str(tmp_path / "any_time.yaml"), "--runs", str(tmp_path), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["any_time", *flags, "--output", str(tmp_path / "any_time")])
    any_time.main()
    printed = capsys.readouterr().out
    assert str(stopped.parents[1]) in printed.splitlines()[0]
    assert f"not in {tmp_path / 'recall' / 'ablation.json'}, and left out: vanilla" in printed
    testbed = json.loads((tmp_path / "any_time" / "any_time.json").read_text())["testbeds"]["squares"]
    assert testbed["compute_ratio_at_equal_quality"] == pytest.approx(0.5)
    assert testbed["compute_ratio_of_the_recipe_itself"] == 1  # nothing cheaper of its own is as good
    assert testbed["quality_at_equal_compute"] == pytest.approx({"paper": 0.7, "ours": 0.95})
    # Within half of the compute of L_max seed 1 would choose L = 2 and seed 0 too; each is scored on the other.
    assert testbed["held_out"]["compute_ratio"] == pytest.approx([0.5, 0.5])
    assert testbed["held_out"]["difference"] == pytest.approx([0.2, -0.1])
    worth = testbed["worth"]["ilsd"]
    assert (worth["plain"], worth["exit guidance"]["score"], worth["exit guidance"]["tried"]) == (0.7, 0.75, 2)
    assert set(testbed["worth"]["recall_ilsd"]) == {"plain"}
    row = next(row for row in testbed["rows"] if (row["recipe"], row["mean_loops"]) == ("ilsd", 1))
    assert {name: row[name] for name in ("steps", "macs_per_sample", "seeds")} == {
        "steps": 3,
        "macs_per_sample": 100,
        "seeds": [0, 1],
    }
    assert (row["mean"], row["std"]) == pytest.approx((0.3, 0.2 / 2**0.5))
    page = (tmp_path / "any_time" / "any_time.md").read_text()
    assert "ours needs 0.50 of its compute" in page
    assert "ahead of the recipe by 0.2, -0.1" in page
    assert "| ILSD | 0.7 | 0.75 (loops 4" in page
    assert (tmp_path / "any_time" / "any_time.png").stat().st_size > 10_000
    section = "\n".join(any_time_section(tmp_path))
    cheapest = "0.50 (of the recipe's own settings 1.00)"
    assert f"| squares, valid | {cheapest} | 0.50, +0.2; 0.50, -0.1 | **holds in 1 of 2 seeds only" in section
    path.write_text(path.read_text().replace('"num_samples": 4', '"num_samples": 5'))
    with pytest.raises(UserError, match="of recall_ilsd, seed 1, have num_samples 5 in place of 4"):
        any_time.main()


@pytest.mark.slow
def test_sigterm_to_the_program_alone_ends_its_workers_at_once(small_squares: Path, tmp_path: Path) -> None:
    """A scheduler may signal one process; a checkpoint takes minutes."""
    run = tmp_path / "recall" / "ilsd_seed0" / "checkpoints" / "last.ckpt"
    run.parent.mkdir(parents=True)
    shutil.copy(small_squares, run)
    (run.parents[1] / TRAINED).touch()
    (tmp_path / "any_time.yaml").write_text(yaml.safe_dump(CONFIG))
    flags = [
        "--config",
        tmp_path / "any_time.yaml",
        "--runs",
        tmp_path,
        "--jobs",
        "1",
        "--output",
        tmp_path / "results",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "elt_lightning.reproduce.any_time", *map(str, flags), "--num_samples", "1000000"],
        cwd=small_squares.parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found: list[str] = []
    try:
        while len(found) < 2:  # the worker, and multiprocessing's own tracker of resources
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
            found = workers.read_text().split()
        process.terminate()
        assert "ended by SIGTERM" in process.communicate(timeout=60)[0]  # the worker holds the pipe open, too
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        for pid in (process.pid, *map(int, found)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_docs_state_what_was_measured() -> None:
    """The table of docs/any_time.md and README's sentence are of the committed results."""
    root = Path(__file__).parents[1]
    testbeds = json.loads((root / "docs/results/any_time/any_time.json").read_text())["testbeds"]
    docs, readme = (root / "docs/any_time.md").read_text(), (root / "README.md").read_text()
    ratios, bests = {}, {}
    for name, testbed in testbeds.items():
        if testbed["held_out"] is None:  # one seed: docs/real_data.md has it
            continue
        ours = testbed["compute_ratio_at_equal_quality"]
        best = [100 * testbed["quality_at_equal_compute"][side] for side in ("paper", "ours")]
        ahead = ", ".join(f"{100 * gap:+.0f}" for gap in testbed["held_out"]["difference"])
        own = testbed["compute_ratio_of_the_recipe_itself"]
        row = f"± {100 * testbed['paper_at_l_max']['std']:.1f} | {ours:.2f} | {own:.2f} | {best[0]:.1f} → {best[1]:.1f}"
        assert f"{row} | {ahead} |" in docs
        ratios[name] = f"{ours:.2f}"
        bests[name] = [f"{value:.0f}" for value in best]
    parts = "{sudoku} of its compute on sudoku, {diffusion} in diffusion and {squares} on squares"
    assert parts.format(**ratios) in readme
    order = ("sudoku", "diffusion", "squares")
    theirs, ours = ([bests[name][side] for name in order] for side in (0, 1))
    assert f"{ours[0]}, {ours[1]} and {ours[2]} %" in readme
    assert f"{theirs[0]}, {theirs[1]} and {theirs[2]}" in readme


NAMED = {
    "the recipe": "ilsd",
    "ILSD": "ilsd",
    "ILSD with recall": "recall_ilsd",
    "deep supervision with recall": "recall_deep_supervision",
}
TESTBEDS = {"squares": "squares", "sudoku": "sudoku", "diffusion": "diffusion", "clips": "video"}


@pytest.mark.parametrize(
    ("page", "heading", "testbed", "weak_loops", "scale"),
    [
        ("any_time", "w, with r = 2 of L = 4", None, 2, 100),
        ("real_data", "fd_fashion", "clothes", 1, 1),
        ("real_data", "fd_fashion", "clothes_diffusion", 1, 1),
    ],
)
def test_docs_state_what_exit_guidance_gave(
    page: str, heading: str, testbed: str | None, weak_loops: int, scale: int
) -> None:
    """Every cell of those tables is a row of the committed results: recipe, loop count, w and r, from zero."""
    root = Path(__file__).parents[1] / "docs"
    measured = json.loads((root / "results/any_time/any_time.json").read_text())["testbeds"]
    lines = iter((root / f"{page}.md").read_text().splitlines())
    columns = re.compile(rf"\| {re.escape(heading)} \| (?:w = )?0 \| 0.25 \| 0.5 \| 1 \| 2 \|")
    for _ in range(2 if testbed == "clothes_diffusion" else 1):
        assert any(columns.fullmatch(line) for line in lines)
    next(lines)
    cells = 0
    while (line := next(lines)).startswith("|"):
        label, *values = [cell.strip() for cell in line.strip("|").split("|")]
        *before, recipe = [label] if testbed else label.split(", ")
        recipe, _, loops = recipe.partition(", L = ")
        of = measured[testbed or TESTBEDS[before[0]]]
        for value, exit_scale in zip(values, (0, 0.25, 0.5, 1, 2), strict=True):
            setting = {"loops": int(loops or 4), "steps": of["sampling_steps"], "guidance": of["guidance"]}
            setting |= {"exit_scale": exit_scale, "weak_loops": weak_loops if exit_scale else None}
            setting |= {"carry_state": False, "tolerance": None, "loop_schedule": "constant"}
            (row,) = (
                row
                for row in of["rows"]
                if row["recipe"] == NAMED[recipe] and row["setting"].items() >= setting.items()
            )
            assert float(value) == pytest.approx(scale * row["mean"], abs=0.501 * 10 ** -len(value.partition(".")[2]))
            cells += 1
    assert cells >= 15

"""What only draws starts without what only trains: Lightning and torchmetrics take longer to import than torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elt_lightning import SPIN_COUNT

HEAVY = ("lightning", "torchmetrics", "pandas", "webdataset", "decord", "tensorboard", "torch._dynamo", "sympy")

STEPS = """
import importlib, json, sys
import elt_lightning
from elt_lightning.cli import main

commands, heavy = json.loads(sys.argv[1])
pictures = elt_lightning.load(sys.argv[2]).draw([1, 2], loops=2)
assert len(pictures) == 2 and "matplotlib" not in sys.modules
for command in commands:
    assert main(command) == 0, command
    assert not (loaded := [name for name in heavy if name in sys.modules]), (command, loaded)
demo, answers = (importlib.import_module(f"elt_lightning.commands.{name}") for name in ("demo", "demo_answers"))
assert "picture" in answers.Answers(demo.build_parser().parse_args(["--model=squares"])).answer("draw", "loops=1")
assert not (loaded := [name for name in heavy if name in sys.modules]), ("demo", loaded)
importlib.import_module("elt_lightning.commands.stats")
assert not (loaded := [name for name in heavy if name in sys.modules and name != "webdataset"]), ("stats", loaded)
"""


def test_drawing_exporting_and_stats_import_nothing_of_training(small_squares: Path, tmp_path: Path) -> None:
    commands = [
        ["export", f"--ckpt_path={small_squares}", f"--output={tmp_path / 'model'}"],
        ["sample", f"--ckpt_path={tmp_path / 'model'}", "--loops=1,2", "--num=2", f"--output={tmp_path / 'grid.png'}"],
    ]
    commands += [["models"], ["sample", "--model=squares", "--num=1", f"--output={tmp_path / 'one.png'}"]]
    arguments = [json.dumps([commands, HEAVY]), str(small_squares)]
    subprocess.run([sys.executable, "-c", STEPS, *arguments], cwd=small_squares.parents[3], check=True)
    assert (tmp_path / "grid.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("set_before", "count"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_do_not_hold_their_cores_while_they_wait(set_before: dict[str, str], count: str) -> None:
    """Beside other programs a sample took a hundred times as long. It is read when torch is loaded, so set before."""
    others = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    line = "import sys, os, elt_lightning; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", line], env=others | set_before, capture_output=True, text=True)
    assert found.stdout == f"{count} False\n"

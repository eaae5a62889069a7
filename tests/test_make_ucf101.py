"""`make ucf101 SMOKE=1`: the whole chain from AVI files to FVD per loop count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from elt_lightning.cli import main

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_whole_chain_runs(tmp_path: Path) -> None:
    # Of the target's environment all is there: nothing is to be installed, whatever the dates of these files say.
    old = ["-o", "pyproject.toml", "-o", "constraints.txt"]
    settings = ["SMOKE=1", f"VIDEO_SMOKE_DIR={tmp_path}", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(["make", *old, "ucf101", *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    index = json.loads((tmp_path / "data" / "train_tokens" / "index.json").read_text())
    assert (index["num_samples"], index["input_shape"], index["frames"]) == (60, [4, 4, 4], 16)
    test = tmp_path / "runs" / "elt_6n4l" / "test"
    report = json.loads((test / "loops.json").read_text())
    assert [row["loops"] for row in report["rows"]] == [1, 2, 3]
    assert report["primary_metric"] == "fvd8"
    assert "styleganv-2048" in report["feature_network"]
    assert all(row["metrics"]["fvd8"]["mean"] > 0 for row in report["rows"])
    assert json.loads((test / "reconstruction.json").read_text())["fvd20"] > 0
    for name in ("loops.gif", "samples.gif"):
        with Image.open(test / name) as film:
            assert film.n_frames == 16  # type: ignore[attr-defined]


def test_the_tokenizer_is_not_tested_by_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "ucf101" / "tokenizer.yaml")
    assert main(["test", "--config", config, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "elt encode uses it" in capsys.readouterr().err

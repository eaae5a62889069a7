"""`make imagenet SMOKE=1`: the whole chain from JPEG files to FID, with networks of the published sizes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_whole_chain_runs(tmp_path: Path) -> None:
    # Of the target's environment all is there: nothing is to be installed, whatever the dates of these files say.
    old = ["-o", "pyproject.toml", "-o", "constraints.txt"]
    settings = ["SMOKE=1", f"SMOKE_DIR={tmp_path}", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(["make", *old, "imagenet", *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unreadable, skipped: n01440764/broken_cut.JPEG" in done.stderr
    for name, kind, loops in (("elt_l_8n3l", "tokens", range(1, 6)), ("elt_8n4l", "latents", range(1, 7))):
        index = json.loads((tmp_path / "data" / f"train_{kind}" / "index.json").read_text())
        assert (index["num_samples"], len(index["unreadable"]), index["copies"]) == (24, 3, 2)
        report = json.loads((tmp_path / "runs" / name / "test" / "loops.json").read_text())
        assert [row["loops"] for row in report["rows"]] == list(loops)
        assert all(row["metrics"]["fid8"]["mean"] > 0 for row in report["rows"])
        for count in loops:
            samples = np.load(tmp_path / "runs" / name / "test" / f"samples_L{count}.npz")["arr_0"]
            assert (samples.shape, samples.dtype) == ((8, 64, 64, 3), np.uint8)
        assert json.loads((tmp_path / "runs" / name / "test" / "reconstruction.json").read_text())["fid9"] > 0

"""`make imagenet SMOKE=1`: the whole chain from JPEG files to FID, with networks of the published sizes."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elt_lightning.reproduce import commands as experiments
from elt_lightning.reproduce.__main__ import main

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_whole_chain_runs(tmp_path: Path) -> None:
    # Of the target's environment all is there: nothing is to be installed, whatever the dates of these files say.
    old = ["-o", "pyproject.toml", "-o", "constraints.txt"]
    settings = ["SMOKE=1", f"SMALL={tmp_path}", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(["make", *old, "imagenet", *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "imagenet"
    assert "unreadable, skipped: n01440764/broken_cut.JPEG" in done.stderr
    for name, kind, loops, scales in (
        ("elt_l_8n3l", "tokens", range(1, 6), (1, 2, 3, 4)),
        ("elt_8n4l", "latents", range(1, 7), (3,)),
    ):
        index = json.loads((folder / "data" / f"train_{kind}" / "index.json").read_text())
        assert (index["num_samples"], len(index["unreadable"]), index["copies"]) == (24, 3, 2)
        report = json.loads((folder / "runs" / name / "test" / "loops.json").read_text())
        swept = [(count, scale) for count in loops for scale in scales]
        assert [(row["loops"], row["guidance"]) for row in report["rows"]] == swept
        assert (report["train_mode"], report["train_steps"]) == ("ilsd", 6)
        assert all(row["metrics"]["fid8"]["mean"] > 0 for row in report["rows"])
        for count, scale in swept:
            stem = f"samples_L{count}" + (f"_guidance{scale}" if len(scales) > 1 else "")
            samples = np.load(folder / "runs" / name / "test" / f"{stem}.npz")["arr_0"]
            assert (samples.shape, samples.dtype) == ((8, 64, 64, 3), np.uint8)
        assert json.loads((folder / "runs" / name / "test" / "reconstruction.json").read_text())["fid9"] > 0


def test_what_an_earlier_step_scored_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"global_step": 500}
    monkeypatch.setattr(experiments, "read_checkpoint", lambda path, prefixes: steps)
    test, checkpoint = tmp_path / "test", tmp_path / "last.ckpt"
    assert not experiments.is_measured(test, checkpoint)
    for trained in (500, 900):
        steps["global_step"] = trained
        report = {"train_steps": trained, "train_mode": "ilsd", "train_loops": 3, "weights": "ema", "rows": [{}]}
        test.mkdir(exist_ok=True)
        (test / "loops.json").write_text(json.dumps(report | {"primary_metric": "fid"}))
        assert experiments.is_measured(test, checkpoint)
        steps["global_step"] = trained + 1
        assert not experiments.is_measured(test, checkpoint)
        assert not test.exists()
    kept = [json.loads((tmp_path / f"earlier_test_{n}" / "loops.json").read_text())["train_steps"] for n in (0, 1)]
    assert kept == [500, 900]


def test_commands_of_a_model_are_those_of_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loop counts and guidance scales as the paper has them."""

    def commands(*flags: str) -> dict[str, list[str]]:
        main(["imagenet", "--vqgan", "v", "--vae", "a", "--runs", str(tmp_path), *flags, "--dry_run"])
        lines = [line.split()[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ elt ")]
        return {line[0]: line for line in lines}

    masked = commands("--models=elt_l_12n2l")["test"]
    assert masked[masked.index("--loops") + 1] == "1,2,3,4"
    assert masked[masked.index("--guidance") + 1] == "1,2,3,4"
    diffusion = commands("--models=elt_4n8l", "--test_flags=--loops 8")["test"]
    assert "--guidance" not in diffusion
    assert diffusion[-2:] == ["--loops", "8"]  # the last one counts
    assert "--loops" not in commands("--models=elt_1n32l")["test"]  # its config names some
    assert set(commands("--models=dit_16")) == {"encode", "fit", "test"}


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        ("__main__", "imagenet", "reproduce: error: masked models need --vqgan"),
        ("__main__", "imagenet --models none", "reproduce: error: there is no model none"),
        ("curves", ". --output curves", "curves: error: . holds no TensorBoard files of a training"),
        ("ablation", "--config none.yaml", "ablation: error: none.yaml: No such file or directory"),
        ("ablation", "--override loops", "'loops' is not NAME=VALUE"),
        ("update_norms", "--ckpt_path none.ckpt", "update_norms: error: there is no checkpoint none.ckpt"),
    ],
)
def test_programs_of_the_makefile_end_in_one_line(
    module: str,
    flags: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As ``python -m`` runs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *flags.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"elt_lightning.reproduce.{module}", run_name="__main__")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert line in error.splitlines()[-1]

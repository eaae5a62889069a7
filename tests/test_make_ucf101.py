"""`make ucf101 SMOKE=1`: the whole chain from AVI files to FVD per loop count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from elt_lightning.cli import main
from elt_lightning.data.toy.moving_digit_tokens import MovingDigitsTokensDataModule, read_all
from elt_lightning.data.ucf101 import list_videos

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the target leaves."""
    folder = tmp_path_factory.mktemp("ucf101_smoke")
    # Of the target's environment all is there: nothing is to be installed, whatever the dates of these files say.
    old = ["-o", "pyproject.toml", "-o", "constraints.txt"]
    settings = ["SMOKE=1", f"SMALL={folder}", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(["make", *old, "ucf101", *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "ucf101"


@pytest.mark.slow
def test_the_whole_chain_runs(smoke: Path) -> None:
    index = json.loads((smoke / "files" / "videos" / "train_tokens" / "index.json").read_text())
    assert (index["num_samples"], index["input_shape"], index["frames"]) == (60, [4, 4, 4], 16)
    test = smoke / "runs" / "elt_6n4l" / "test"
    report = json.loads((test / "loops.json").read_text())
    assert [row["loops"] for row in report["rows"]] == [1, 2, 3]
    assert report["primary_metric"] == "fvd8"
    assert "styleganv-2048" in report["feature_network"]
    assert all(row["metrics"]["fvd8"]["mean"] > 0 for row in report["rows"])
    assert json.loads((test / "reconstruction.json").read_text())["fvd20"] > 0
    for name in ("loops.gif", "samples.gif"):
        with Image.open(test / name) as film:
            assert film.n_frames == 16  # type: ignore[attr-defined]


@pytest.mark.slow
def test_samples_of_moving_digits_are_judged_by_their_motions(smoke: Path) -> None:
    videos = smoke / "files" / "videos"
    data = MovingDigitsTokensDataModule(
        str(videos / "train_tokens"), str(videos / "test_tokens"), root=str(videos), stride=1
    )
    assert (data.num_classes, data.input_shape, data.primary_metric) == (10, (4, 4, 4), "recognised")
    data.prepare_data()
    real = read_all(list_videos(videos / "UCF-101", videos / "ucfTrainTestlist", 1, val=False), data.shape, 1)
    scores = {}
    for metric in data.build_metrics():
        metric.update(real.pixels.float() / 255, real.labels)
        scores |= {name: float(value) for name, value in metric.compute().items()}
    assert scores["recognised"] > 0.8  # of the videos that the network learnt from; one of ten by chance
    assert scores["fd_motion"] > 0


def test_the_tokenizer_is_not_tested_by_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "ucf101" / "tokenizer.yaml")
    assert main(["test", "--config", config, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "elt encode uses it" in capsys.readouterr().err

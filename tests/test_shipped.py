"""The models that come along: they draw what they drew when they were made, and score as their sweeps say."""

import json
import math
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import elt_lightning
from elt_lightning.checkpoints import shipped
from elt_lightning.cli import main
from elt_lightning.data.toy.latin_square_images import LatinSquareImagesDataModule
from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule
from elt_lightning.data.toy.sudoku import SudokuDataModule
from elt_lightning.errors import UserError
from elt_lightning.evaluation.sweep import Sweep
from elt_lightning.metrics.latin_squares import LatinSquareScores
from elt_lightning.metrics.motion import MotionNetwork
from elt_lightning.metrics.small_pictures import PictureNetwork
from elt_lightning.reproduce.ship import MOST_BYTES, means
from elt_lightning.samplers.base import SETTINGS

SAMPLES = 64
SQUARES = (LatinSquaresDataModule, LatinSquareImagesDataModule, SudokuDataModule)
KINDS = {f"{kind.__module__}.{kind.__name__}": kind for kind in SQUARES}


def test_a_score_that_is_not_a_number_is_never_the_best() -> None:
    rows = [{"loops": 4, "metrics": {"fid": {"mean": score}}} for score in (math.nan, 3.0, 2.0, math.nan)]
    sweep = {"rows": rows, "primary_metric": "fid", "higher_is_better": False, "train_loops": 4}
    assert shipped.recorded(sweep) is rows[2]


@pytest.mark.parametrize("name", shipped.names())
def test_a_model_that_comes_along_draws_what_it_drew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processors' kernels may round otherwise, which may turn one sample of eight into another."""
    monkeypatch.chdir(tmp_path)
    now, then = (
        torch.tensor(v) for v in (means(elt_lightning.load(name)), shipped.read_json(name, "made.json")["means"])
    )
    assert ((now - then).abs() < 0.01).sum() >= 7, (now, then)


@pytest.mark.parametrize(
    "name", [name for name in shipped.names() if shipped.read_json(name, "made.json")["data"]["class_path"] in KINDS]
)
def test_a_model_that_comes_along_scores_as_its_sweep_says(name: str, tmp_path: Path) -> None:
    """Squares can be judged exactly: shares of valid ones and of their lines lie within four standard deviations."""
    sweep, settings = shipped.read_json(name, "loops.json"), shipped.read_json(name, "made.json")["data"]
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in settings["init_args"].items()}
    data = KINDS[settings["class_path"]](**arguments | {"root": str(tmp_path)})
    assert sweep["parts_given"] == (data.num_given > 0)
    assert shipped.read_json(name, "made.json")["class_names"] == data.class_names
    for tokenizer in shipped.folder_of(name).glob("tokenizer.*"):
        shutil.copy(tokenizer, data.codebook_path)
    data.setup("predict")
    row, model = shipped.recorded(sweep), elt_lightning.load(name)
    sampler, loops = model.sampler(row["loops"], **{setting: row[setting] for setting in SETTINGS})
    metrics = [LatinSquareScores(data.load_digit_network(), data.order, data.boxes)]
    scores = Sweep(SAMPLES, SAMPLES, sweep["seed"])
    found = scores.run(model.module, sampler, model.tokenizer, metrics, loops, data.request)
    for metric in ("valid_squares", "valid_lines"):
        expected = row["metrics"][metric]["mean"]
        assert abs(found.mean(metric) - expected) < 4 * math.sqrt(expected * (1 - expected) / SAMPLES) + 1 / SAMPLES


@pytest.mark.parametrize(
    ("name", "network", "samples"),
    [
        ("clips", MotionNetwork(), 20),
        *((name, PictureNetwork(10), SAMPLES) for name in ("fashion", "fashion_diffusion")),
    ],
)
def test_what_a_model_draws_is_recognised_as_its_sweep_says(
    name: str, network: PictureNetwork | MotionNetwork, samples: int
) -> None:
    """By the network that judged the sweep, in half precision beside this file; within four standard deviations."""
    sweep, model = shipped.read_json(name, "loops.json"), elt_lightning.load(name)
    network.load_state_dict(load_file(Path(__file__).parent / f"{sweep['feature_network']}.safetensors"))
    row = shipped.recorded(sweep)
    sampler, loops = model.sampler(row["loops"], **{setting: row[setting] for setting in SETTINGS})
    codes = model.codes(model.labels(None, samples), loops, sampler)
    with torch.no_grad():
        named = network(model.tokenizer.decode(codes)).argmax(1)
    expected = row["metrics"]["recognised"]["mean"]
    found = (named == model.labels(None, samples)).double().mean().item()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / samples) + 1 / samples


def test_models_lists_all_of_them_and_a_wrong_name_does_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(f"│ {name} " in listed for name in shipped.names())
    assert main(["sample", "--model=sqares"]) == 2
    error = capsys.readouterr().err
    assert "no model 'sqares' comes along: there are " in error
    assert ", ".join(shipped.names()) in error
    assert main(["sample", "--model=squares", "--ckpt_path=x"]) == 2
    with pytest.raises(UserError, match="no model 'sqares' comes along"):
        elt_lightning.load("sqares")


def test_they_are_small_and_the_wheel_has_every_file() -> None:
    package, files = shipped.FOLDER.parent, [path for path in shipped.FOLDER.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= MOST_BYTES
    project = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["elt_lightning"]
    configs = (package.parent / "configs").rglob("*.yaml")  # elt_lightning/configs is a link
    files += [package / path.relative_to(package.parent) for path in configs]
    assert {*files, package / "commands" / "demo.html"} <= {
        path for pattern in patterns for path in package.glob(pattern)
    }


def test_an_export_with_its_tokenizer_draws_anywhere(
    small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    model = str(tmp_path / "model")
    assert main(["export", f"--ckpt_path={small_squares}", f"--output={model}", "--with_tokenizer"]) == 0
    before = means(elt_lightning.load(small_squares))
    shutil.move(model, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert json.loads((tmp_path / "elsewhere" / "config.json").read_text())["tokenizer"]["init_args"] == {
        "path": "tokenizer.safetensors"
    }
    assert means(elt_lightning.load("elsewhere")) == before

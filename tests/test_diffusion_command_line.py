"""The commands end to end on the diffusion family: the same ones as for tokens, with other parts plugged in."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_runs import SMALL, train_small_squares

from elt_lightning.checkpoints.pretrained import build_module
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import main
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.loading import load_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART, DIGITS = CONFIGS / "quickstart_diffusion.yaml", CONFIGS / "digits_diffusion.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all: the cached data and the trained run are shared."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def work_at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def checkpoint(home: Path) -> Path:
    """A diffusion model trained for six steps on images of Latin squares."""
    return train_small_squares(QUICKSTART, home)


def trained_weights(folder: str, *settings: str) -> dict[str, torch.Tensor]:
    """Weights after three steps on digits."""
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", f"--run_dir={folder}"]
    assert main(["fit", "--config", str(DIGITS), *SMALL, *steps, *settings]) == 0
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_checkpoint_says_how_to_build_model_and_tokenizer(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    assert content["global_step"] == content["ema"]["updates"] == 6
    assert content["elt"]["model"]["network"]["init_args"]["input_shape"] == [1, 40, 40]
    assert isinstance(load_tokenizer(content["elt"]["tokenizer"]), PixelScaling)
    module = build_module(content)
    assert (module.network.sample_shape, module.num_classes) == ((1, 40, 40), 5)
    assert content["elt"]["model"]["class_dropout_prob"] == 0.1


def test_sweep_scores_continuous_pictures_as_it_does_tokens(checkpoint: Path) -> None:
    flags = ["--loops", "1,4,6", "--guidance=1,2", "--num_samples=12", "--run_dir=runs/sweep"]
    assert main(["test", "--ckpt_path", str(checkpoint), *flags]) == 0
    report = json.loads(Path("runs/sweep/loops.json").read_text())
    assert (report["primary_metric"], report["train_loops"], report["sampling_steps"]) == ("valid_squares", 4, 3)
    assert [(row["loops"], row["guidance"]) for row in report["rows"]] == [(k, g) for k in (1, 4, 6) for g in (1, 2)]
    assert all(set(row["metrics"]) == {"valid_squares", "valid_lines", "fd_digits"} for row in report["rows"])
    first, second = report["rows"][:2]
    assert second["macs_per_sample"] == 2 * first["macs_per_sample"]
    for picture in ("loops.png", "pareto.png"):
        assert Image.open(Path("runs/sweep") / picture).size[0] > 100


def test_predict_and_sample_draw_from_the_checkpoint(checkpoint: Path) -> None:
    flags = ["--num_samples=7", "--samples.batch_size=4", "--loops=2", "--run_dir=runs/predicted"]
    assert main(["predict", "--ckpt_path", str(checkpoint), *flags]) == 0
    content = np.load("runs/predicted/samples.npz")
    assert (content["arr_0"].shape, content["arr_0"].dtype) == ((7, 40, 40, 1), np.uint8)
    assert content["labels"].tolist() == [i % 5 for i in range(7)]
    flags = ["--classes=3,4", "--num=4", "--loops=1,2", "--guidance=2", "--steps=2", "--output=grid.png"]
    assert main(["sample", "--ckpt_path", str(checkpoint), *flags]) == 0
    assert np.array(Image.open("grid.png")).std() > 0


@pytest.mark.parametrize("sampler", ["DDPMSampler", "DDIMSampler"])
def test_another_sampler_takes_the_place_of_the_trained_one(sampler: str, checkpoint: Path) -> None:
    flags = [
        f"--model.sampler=elt_lightning.samplers.diffusion.{sampler}",
        "--model.sampler.init_args.steps=2",
        "--num_samples=12",
    ]
    assert main(["test", "--ckpt_path", str(checkpoint), *flags, "--loops=2", f"--run_dir=runs/{sampler}"]) == 0
    assert json.loads(Path(f"runs/{sampler}/loops.json").read_text())["sampling_steps"] == 2


def test_checkpointed_loops_train_the_same_weights() -> None:
    plain = trained_weights("runs/plain")
    recomputed = trained_weights("runs/recomputed", "--model.network.init_args.activation_checkpointing=true")
    assert plain.keys() == recomputed.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(recomputed[name], weight, rtol=1e-5, atol=1e-6)


def test_flow_matching_is_a_matter_of_the_config(tmp_path: Path) -> None:
    config = yaml.safe_load(DIGITS.read_text())
    config["model"]["objective"] = {"class_path": "elt_lightning.objectives.flow_matching.FlowMatchingObjective"}
    config["model"]["process"] = {"class_path": "GaussianProcess", "init_args": {"prediction": "velocity"}}
    file = tmp_path / "flow.yaml"
    file.write_text(yaml.safe_dump(config))
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--run_dir=runs/flow"]
    assert main(["fit", "--config", str(file), *SMALL, *steps]) == 0
    assert Path("runs/flow/checkpoints/last.ckpt").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_mixed_precision_trains_float32_weights() -> None:
    weights = trained_weights("runs/bf16", "--trainer.precision=bf16-mixed", "--trainer.accelerator=gpu")
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())


def test_update_norms_of_a_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elt_lightning.reproduce import update_norms

    arguments = ["--ckpt_path", str(checkpoint), "--loops=5", "--num=4"]
    monkeypatch.setattr("sys.argv", ["update_norms", *arguments])
    update_norms.main()
    folder = checkpoint.parent.parent / "update_norms_0"
    with (folder / "update_norms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), int(row["loop"])) for row in rows] == [(k, r) for k in range(1, 4) for r in range(1, 6)]
    assert all(float(row["update_norm"]) > 0 for row in rows)
    assert Image.open(folder / "update_norms.png").size[0] > 100


@pytest.mark.slow
def test_digits_are_recognised_at_every_loop_count() -> None:
    """Chance is one in ten; a share of 200 samples at 0.1 has a standard deviation of 0.02."""
    settings = ["--trainer.max_steps=250", "--trainer.val_check_interval=250", "--run_dir=runs/learned"]
    settings += ["--loop_metrics.num_validation_samples=0", "--loop_metrics.num_samples=200", "--ema.decay=0.98"]
    assert main(["fit", "--config", str(DIGITS), *settings]) == 0
    sweep = ["--loops=1,2,3,4", "--num_samples=200", "--run_dir=runs/learned/test"]
    assert main(["test", "--ckpt_path=runs/learned/checkpoints/last.ckpt", *sweep]) == 0
    rows = json.loads(Path("runs/learned/test/loops.json").read_text())["rows"]
    assert min(row["metrics"]["recognised"]["mean"] for row in rows) > 0.4

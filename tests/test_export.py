"""Models to publish: `elt export`, `from_pretrained`, and sampling from what they write and read."""

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import train_small_squares
from torch import nn

import elt_lightning
from elt_lightning import from_pretrained
from elt_lightning.checkpoints import shipped
from elt_lightning.checkpoints.pretrained import OF_TRAINING, build_module
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import main
from elt_lightning.commands.export import describe
from elt_lightning.commands.push import measurements
from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.model import ELTModel
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.onnx_runner import GRAPHS, OnnxNetwork
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.exported import predict_by
from elt_lightning.training.module import ELTModule

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart_recall.yaml"


class TiedTransformer(LoopedMaskedTransformer):
    """The same network, one of whose layers has two names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.also_head_dense: nn.Module = self.head_dense


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_squares(QUICKSTART, tmp_path_factory.mktemp("export"))


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.chdir(checkpoint.parent.parent.parent.parent)


def export(checkpoint: Path, folder: Path, *flags: str) -> Path:
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", str(folder), *flags]) == 0
    return folder


def draw(module: ELTModel) -> torch.Tensor:
    return module.sample(torch.arange(4), 3, sample_seeds(0, torch.arange(4)))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_exported_model_is_the_one_of_the_checkpoint(weights: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "model", "--weights", weights)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    original = build_module(read_checkpoint(checkpoint), weights)
    loaded = from_pretrained(folder)
    assert not loaded.training
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, original.state_dict()[name])
    assert torch.equal(draw(loaded), draw(original))


def test_the_config_says_how_to_build_the_model_and_nothing_of_where_the_data_lay(
    checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((export(checkpoint, tmp_path / "model") / "config.json").read_text())
    recipe = torch.load(checkpoint, weights_only=True)["elt"]
    assert (config["version"], config["weights"], config["step"]) == (2, "ema", 6)
    assert (config["model"], config["tokenizer"]) == (recipe["model"], recipe["tokenizer"])
    assert config["data"] == {
        "class_path": "elt_lightning.data.toy.latin_squares.LatinSquaresDataModule",
        "num_classes": 5,
        "input_shape": [5, 5],
        "codebook_size": recipe["model"]["network"]["init_args"]["codebook_size"],
    }


def test_sample_draws_the_same_from_the_folder_as_from_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights in ("ema", "raw"):
        folder = export(checkpoint, tmp_path / weights, f"--weights={weights}")
        for source in (checkpoint, folder):
            flags = [f"--ckpt_path={source}", f"--weights={weights}", "--num=2", f"--output={source}.png"]
            assert main(["sample", *flags, "--overwrite"]) == 0
        assert Path(f"{checkpoint}.png").read_bytes() == Path(f"{folder}.png").read_bytes()
    alone = ["sample", f"--ckpt_path={tmp_path / 'raw'}", "--num=2", f"--output={tmp_path / 'alone.png'}"]
    assert main(alone) == 0  # an exported model's own weights
    assert (tmp_path / "alone.png").read_bytes() == Path(f"{checkpoint}.png").read_bytes()
    assert main([*alone, "--weights=ema", "--overwrite"]) == 2
    assert "--weights raw" in capsys.readouterr().err


def test_test_and_predict_measure_an_exported_model_as_its_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the data's settings are not in the folder."""
    folder = export(checkpoint, tmp_path / "model")
    settings = {"num_train": 64, "num_val": 40, "batch_size": 16, "codes_per_digit": 4}
    data = [f"--data.init_args.{name}={value}" for name, value in settings.items()]
    draws = ["--loops=1,3", "--loop_metrics.num_samples=12"]
    reports, samples = [], []
    for source, flags in ((checkpoint, []), (folder, data)):
        home = tmp_path / source.stem
        assert main(["test", f"--ckpt_path={source}", *flags, *draws, f"--run_dir={home}/test"]) == 0
        reports.append(json.loads((home / "test" / "loops.json").read_text()))
        six = ["--num_samples=6", "--loops=2", f"--run_dir={home}/predict"]
        assert main(["predict", f"--ckpt_path={source}", *flags, *six]) == 0
        samples.append(np.load(home / "predict" / "samples.npz")["arr_0"])
    for row in (row for report in reports for row in report["rows"]):
        del row["samples_per_second"]
    assert reports[0] == reports[1]
    assert (reports[1]["weights"], reports[1]["train_steps"]) == ("ema", 6)
    assert np.array_equal(*samples)
    assert main(["test", f"--ckpt_path={folder}", *data, "--weights=raw", f"--run_dir={tmp_path / 'raw'}"]) == 2
    assert "--weights ema" in capsys.readouterr().err
    raw = export(checkpoint, tmp_path / "raw_model", "--weights=raw")
    assert main(["predict", f"--ckpt_path={raw}", *data, *six[:2], f"--run_dir={tmp_path / 'raw'}"]) == 0


def test_nothing_is_overwritten_unless_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.safetensors", "README.md"):
        (folder / name).write_text("What it is.\n")
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", str(folder), "--with_tokenizer"]) == 2
    assert "has a tokenizer.safetensors: choose another --output" in capsys.readouterr().err
    (folder / "tokenizer.safetensors").unlink()
    export(checkpoint, folder)
    before = sha256(folder / "model.safetensors")
    arguments = ["export", "--ckpt_path", str(checkpoint), "--output", str(folder), "--weights=raw"]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sha256(folder / "model.safetensors") == before
    assert main([*arguments, "--overwrite"]) == 0
    assert sha256(folder / "model.safetensors") != before
    assert json.loads((folder / "config.json").read_text())["weights"] == "raw"
    assert (folder / "README.md").read_text() == "What it is.\n"


def test_a_tokenizer_by_a_relative_path_is_found_from_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    (tmp_path / "codes.pt").touch()
    tokenizer = {"class_path": "Codes", "init_args": {"path": "codes.pt"}}
    recipe = content["elt"] | {"folder": str(tmp_path), "tokenizer": tokenizer}
    recipe["model"] = recipe["model"] | {"outer_teacher": {"path": "runs/deep", "weight": 1.0}}
    described = describe(content | {"elt": recipe}, "ema")
    assert described["tokenizer"] == {"class_path": "Codes", "init_args": {"path": str(tmp_path / "codes.pt")}}
    assert described["model"]["outer_teacher"] is None  # it lay where the training did


def test_a_full_disk_leaves_the_older_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(checkpoint, tmp_path / "model")
    before = {path.name: sha256(path) for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elt_lightning.commands.export.save_file", full)
    arguments = ["export", "--ckpt_path", str(checkpoint), "--output", str(folder), "--weights=raw", "--overwrite"]
    assert main(arguments) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: sha256(path) for path in folder.iterdir()} == before


def test_tied_weights_are_exported_with_their_average_under_all_names(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["elt"]["model"]["network"]["class_path"] = f"{__name__}.TiedTransformer"
    for name in ("weight", "bias"):
        content["state_dict"][f"network.also_head_dense.{name}"] = content["state_dict"][f"network.head_dense.{name}"]
    torch.save(content, tmp_path / "tied.ckpt")
    folder = export(tmp_path / "tied.ckpt", tmp_path / "tied")
    written = load_file(folder / "model.safetensors")
    network: Any = from_pretrained(folder).network
    assert network.also_head_dense.weight is network.head_dense.weight
    average = content["ema"]["weights"]["network.head_dense.weight"]
    for weight in (network.head_dense.weight, *(written[f"network.{n}head_dense.weight"] for n in ("", "also_"))):
        assert torch.equal(weight, average)


@pytest.mark.slow
def test_onnx_graphs_draw_the_samples_of_their_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, with the state carried from step to step; the folder is a model folder as well."""
    folder = export(checkpoint, tmp_path / "model", "--format=onnx")
    assert "differ by at most" in capsys.readouterr().out
    module = from_pretrained(folder)
    assert module.sampler.carry_state
    graphs, process = OnnxNetwork(folder), module.process
    seeds = sample_seeds(0, torch.arange(4))
    shape, sampler = module.network.sample_shape, module.sampler.with_settings(guidance=2.0)
    for loops in (1, 3):
        samples = sampler.sample(predict_by(graphs, process), shape, Condition(torch.arange(4)), loops, seeds)
        assert torch.equal(samples, module.sample(torch.arange(4), loops, seeds, sampler=sampler))
    with pytest.raises(ValueError, match="exits lie in"):
        graphs(torch.zeros(1, *shape), Condition(torch.zeros(1)), 2, (3,))
    # Weights lie in model.safetensors alone; files of another format do not outlive the model they are of.
    assert max((folder / f"{graph}.onnx").stat().st_size for graph in GRAPHS) < 50_000
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    export(folder, folder, "--overwrite")  # of the exported model itself
    assert all(
        torch.equal(*both) for both in zip(from_pretrained(folder).parameters(), module.parameters(), strict=True)
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'none'}", "--format=onnx"]
    assert main(arguments) == 2
    assert "pip install 'elt-lightning[onnx]'" in capsys.readouterr().err


def test_the_model_has_all_settings_of_the_module_but_those_of_training() -> None:
    of_both, of_model = (inspect.signature(kind).parameters.keys() for kind in (ELTModule, ELTModel))
    assert of_both - of_model == set(OF_TRAINING)
    assert of_model < of_both


def test_from_pretrained_takes_checkpoints_too(checkpoint: Path) -> None:
    assert torch.equal(draw(from_pretrained(checkpoint)), draw(build_module(read_checkpoint(checkpoint))))


def test_a_name_on_hugging_face_is_fetched(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(checkpoint, tmp_path / "model")
    asked: list[Any] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, sorted(allow_patterns)))
        return str(shutil.copytree(folder, tmp_path / "cache"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    module = from_pretrained("someone/elt-squares", revision="v1")
    assert asked == [("someone/elt-squares", "v1", ["config.json", "model.safetensors", "tokenizer.*"])]
    assert torch.equal(draw(module), draw(from_pretrained(folder)))


def offline(*_: object, **__: object) -> None:
    raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand a long story")


def unknown(*_: object, **__: object) -> None:
    raise huggingface_hub.errors.HFValidationError("a repository of another name")


@pytest.mark.parametrize(("answer", "telling"), [(offline, "no connection"), (unknown, "of another name")])
def test_what_hugging_face_does_not_give_is_said_in_one_line(
    answer: Callable[..., None], telling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(UserError, match=f"someone/nothing.*{telling}$"):
        from_pretrained("someone/nothing")


def test_without_huggingface_hub_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install .elt-lightning.hub"):
        from_pretrained("someone/nothing")


@pytest.mark.parametrize("source", ["nowhere", "nowhere/last.ckpt", "a/b/c", "/nowhere/at-all", ""])
def test_what_can_be_no_name_is_not_looked_for_on_hugging_face(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"there is no checkpoint|was not written by|comes along"):
        from_pretrained(source)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hugging Face, as a folder that keeps what is uploaded."""

    class Hub:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            assert exist_ok
            (tmp_path / "hub" / repo_id).mkdir(parents=True)

        def repo_info(self, repo_id: str) -> SimpleNamespace:
            return SimpleNamespace(private=False)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_a_token")
    return tmp_path / "hub"


def test_push_uploads_a_model_that_draws_and_a_card_with_its_sweep(
    checkpoint: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "someone/squares", "--ckpt_path=squares", "--license=apache-2.0"]) == 0
    there = hub / "someone" / "squares"
    assert "https://huggingface.co/someone/squares: README.md, config.json, loops.json" in capsys.readouterr().out
    card = (there / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: elt-lightning\n")
    assert "\nlicense: apache-2.0\n---\n" in card
    lines = card.partition("```python\n")[2].partition("```")[0]
    row = shipped.recorded(shipped.read_json("squares", "loops.json"))
    assert f"| 4 | {row['macs_per_sample'] / 1e9:.3g} | {row['metrics']['valid_squares']['mean']:.4g} |" in card
    raw = ["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'raw'}", "--weights=raw"]
    assert main(raw) == 0
    assert main(["push", "someone/small", f"--ckpt_path={tmp_path / 'raw'}"]) == 0  # an exported model's own weights
    assert json.loads((hub / "someone" / "small" / "config.json").read_text())["weights"] == "raw"
    assert main(["push", "someone/average", f"--ckpt_path={tmp_path / 'raw'}", "--weights=ema"]) == 2
    monkeypatch.chdir(hub)  # where no data lie: the tokenizer is the one that was uploaded
    drawn: dict[str, Any] = {}
    exec(lines, drawn)  # as the card says
    expected = elt_lightning.load("squares").draw([0, 1, 2, 3])
    assert [picture.tobytes() for picture in drawn["pictures"]] == [picture.tobytes() for picture in expected]
    assert len(elt_lightning.load("someone/small").draw()) == 5


def test_the_card_says_at_which_settings_each_loop_count_was_measured(tmp_path: Path) -> None:
    scores = {1.0: {"mean": 0.5, "std": 0.125}, 2.0: {"mean": 0.75, "std": None}}
    rows = [{"loops": 4, "guidance": g, "macs_per_sample": 2e9, "metrics": {"valid": s}} for g, s in scores.items()]
    rows.append(rows[0] | {"loops": 2, "macs_per_sample": 1e9})
    sweep = {"num_samples": 1000, "primary_metric": "valid", "higher_is_better": True, "train_loops": 4, "rows": rows}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "loops.json").write_text(json.dumps(sweep | {"weights": "ema", "train_steps": 10}))
    lines = measurements(tmp_path / "sweep", tmp_path, "ema", 10).splitlines()
    assert lines[3] == "1,000 samples for each row; valid: higher is better."
    assert lines[5].startswith("| loops | guidance | ")
    assert lines[7:] == ["| 2 | 1.0 | 1 | 0.5 ± 0.12 |", "| 4 | 2.0 | 2 | 0.75 |"]
    for of_model, telling in (
        (("raw", 10), "weights are ema"),
        (("ema", 20), "train_steps are 10, those of this one 20"),
    ):
        with pytest.raises(UserError, match=f"is of another model: its {telling}"):
            measurements(tmp_path / "sweep", tmp_path, *of_model)


def test_what_keeps_push_from_uploading_is_one_line(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push = ["push", "someone/squares", f"--ckpt_path={shipped.folder_of('squares')}"]
    complaints = []

    def refuse() -> None:
        assert main(push) == 2
        complaints.append(capsys.readouterr().err)

    push.append("--private")
    refuse()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    refuse()
    push += [f"--sweep={tmp_path}"]
    refuse()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refuse()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse()
    public = "--private: someone/squares is there already, and everyone may see it"
    tellings = (
        public,
        "did not take someone/squares: no connection",
        "has no loops.json",
        "HF_TOKEN",
        "elt-lightning[hub]",
    )
    for complaint, telling in zip(complaints, tellings, strict=True):
        assert len(complaint.splitlines()) == 1
        assert telling in complaint

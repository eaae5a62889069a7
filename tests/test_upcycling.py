"""A trained unlooped model as the beginning of a looped one: `elt loop`, `elt fit --init_from`, the outer teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import SMALL_SQUARES

from elt_lightning import from_pretrained
from elt_lightning.checkpoints.initial import Init, looped, take_over
from elt_lightning.checkpoints.pretrained import empty_module
from elt_lightning.cli import main
from elt_lightning.commands.settings import config_and_bases, with_stored_config
from elt_lightning.commands.train import teach
from elt_lightning.data.base import Batch
from elt_lightning.errors import UserError
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.training.module import ELTModule, OuterTeacher

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
LAYERS = "network.backbone.layers."


def unlooped(num_layers: int) -> dict[str, Any]:
    """Return what is read of an unlooped model of random weights."""
    sizes = {"codebook_size": 6, "input_shape": [2, 3], "num_classes": 2, "width": 8, "num_heads": 2}
    section = {
        "network": {
            "class_path": "elt_lightning.networks.masked.LoopedMaskedTransformer",
            "init_args": sizes | {"num_layers": num_layers, "initial_std": 0.3},
        },
        "process": {
            "class_path": "elt_lightning.processes.masking.MaskingProcess",
            "init_args": {"codebook_size": 6},
        },
        "objective": {"class_path": "elt_lightning.objectives.masked.MaskedObjective"},
        "distillation": {"max_loops": 1, "mode": "vanilla"},
        "sampler": {"class_path": "elt_lightning.samplers.masked.MaskGITSampler"},
        "num_classes": 2,
    }
    torch.manual_seed(0)
    state = empty_module(section).state_dict()
    return {"elt": {"model": section}, "state_dict": state, "exported": "raw"}


def logits(module: ELTModule, loops: int) -> torch.Tensor:
    labels, tokens = torch.tensor([0, 1]), torch.tensor([[0, 1, 2, 3, 4, 6], [6, 6, 1, 0, 5, 6]])
    with torch.no_grad():
        return module.network(tokens, Condition(labels), loops).predictions[loops]


@pytest.mark.parametrize("init", ["average", "first"])
def test_a_model_whose_layers_repeat_already_stays_the_same_function(init: Init) -> None:
    checkpoint = unlooped(8)
    state = checkpoint["state_dict"]
    for name in [name for name in state if name.startswith(LAYERS)]:
        number, _, rest = name.removeprefix(LAYERS).partition(".")
        if 1 <= int(number) <= 6:  # of prelude 1, two layers three times, coda 1
            state[name] = state[f"{LAYERS}{1 + (int(number) - 1) % 2}.{rest}"]
    section, module, line = looped(checkpoint, 2, 3, init, prelude=1, coda=1)
    original = empty_module(checkpoint["elt"]["model"])
    original.load_state_dict(state)
    torch.testing.assert_close(logits(module, 3), logits(original.eval(), 1))
    assert section["distillation"] == {"max_loops": 3, "min_loops": 1, "mode": "ilsd"}
    assert "fresh: nothing; left out: nothing" in line


@pytest.mark.parametrize(
    ("init", "made_of"),
    [
        ("average", [[0, 2, 4], [1, 3, 5]]),
        ("every_kth", [[0], [3]]),
        ("first", [[0], [1]]),
        ("blocks", [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_shared_layers_are_made_of_the_layers_that_are_named(init: Init, made_of: list[list[int]]) -> None:
    checkpoint = unlooped(6)
    _, module, line = looped(checkpoint, 2, 3, init, recall=True)
    assert ("(4 of them left out)" in line) == (init in ("every_kth", "first"))
    state, made = checkpoint["state_dict"], module.state_dict()
    for name in [name.removeprefix(f"{LAYERS}0.") for name in state if name.startswith(f"{LAYERS}0.")]:
        for n, sources in enumerate(made_of):
            mean = sum(state[f"{LAYERS}{source}.{name}"] for source in sources) / len(sources)
            torch.testing.assert_close(made[f"{LAYERS}{n}.{name}"], mean)
    assert "fresh: network.backbone.recall.weight; left out: nothing" in line


def test_layers_that_do_not_come_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 6 layers, not 1 \+ 2·3 \+ 0"):
        looped(unlooped(6), 2, 3, "average", prelude=1)
    checkpoint = unlooped(6)
    checkpoint["elt"]["model"]["distillation"] = {"max_loops": 2}
    with pytest.raises(UserError, match="loops already"):
        looped(checkpoint, 2, 3, "average")


def test_weights_that_are_not_finite_are_not_begun_from() -> None:
    checkpoint = unlooped(2)
    checkpoint["state_dict"][f"{LAYERS}1.mlp_in.bias"][0] = torch.nan
    with pytest.raises(UserError, match=r"1 not finite such as .*1\.mlp_in\.bias"):
        take_over(empty_module(checkpoint["elt"]["model"]), checkpoint["state_dict"])


def test_what_a_training_begins_from_is_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a config its settings would not count; a run's own config can still be read, whatever it says of that."""
    config = tmp_path / "run.yaml"
    config.write_text("init_from: models/deep\n")
    assert main(["fit", "--config", str(config)]) == 2
    assert "give it on the command line, --init_from models/deep" in capsys.readouterr().err
    config.write_text("init_from: null\nseed_everything: 1\n")
    (written,) = config_and_bases(config, tmp_path)
    assert written.read_text() == "seed_everything: 1\n"
    config.write_text("init_from: models/deep\nckpt_path: runs/of_old.ckpt\n")
    for command, flag in (("test", "ckpt_path"), ("fit", "ckpt_path"), ("fit", "init_from")):
        assert main([command, "--config", str(config), f"--{flag}=no.ckpt"]) == 2
        wanted = "there is no checkpoint no.ckpt" if flag == "ckpt_path" else "--ckpt_path runs/of_old.ckpt"
        assert wanted in capsys.readouterr().err
    config.write_text("init_from: models/deep\n")
    assert main(["fit", "--config", str(config), "--init_from=no.ckpt"]) == 2
    assert "there is no checkpoint no.ckpt" in capsys.readouterr().err


def test_the_outer_teacher_adds_its_loss_on_the_same_batch() -> None:
    teacher_file = unlooped(6)
    _, model, _ = looped(teacher_file, 2, 3, "average")
    parts = (model.network, model.process, MaskedObjective, model.distillation, lambda *_: model.sampler)
    module = ELTModule(*parts, num_classes=model.num_classes).eval()
    teacher = empty_module(teacher_file["elt"]["model"])
    batch = Batch(torch.randint(6, (4, 6)), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    plain, _ = module.loss(batch, 5, 0.5)
    module.outer_teacher = OuterTeacher("somewhere", weight=0.7)
    with pytest.raises(UserError, match="not loaded"):
        module.loss(batch, 5, 0.5)
    with pytest.raises(UserError, match=r"--model\.outer_teacher\.path nowhere: no model 'nowhere'.*=null"):
        teach(module, "nowhere", from_pretrained)
    module.num_classes = 3
    with pytest.raises(UserError, match=r"the outer teacher has another number of classes$"):
        module.learn_from(teacher)
    module.num_classes = 2
    module.learn_from(teacher)
    loss, terms = module.loss(batch, 5, 0.5)
    corrupted = module.objective.corrupt(batch.x, sample_seeds(0, batch.indices), 5)
    # What is dropped of the labels is the same for both: without any the losses can be computed anew.
    module.class_dropout_prob = 0.0
    loss, terms = module.loss(batch, 5, 0.5)
    condition = Condition(batch.labels)
    wanted = teacher.network(corrupted.inputs, condition, 1).predictions[1]
    found = module.network(corrupted.inputs, condition, 3).predictions[3]
    expected = module.objective.distillation(found, wanted, corrupted).mean()
    torch.testing.assert_close(terms["loss_outer_teacher"], expected.detach())
    module.outer_teacher = None
    plain, _ = module.loss(batch, 5, 0.5)
    torch.testing.assert_close(loss, plain + 0.7 * expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert module.state_dict().keys() == looped(teacher_file, 2, 3, "average")[1].state_dict().keys()


@pytest.mark.slow
def test_from_an_unlooped_run_to_a_looped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way by the command line, and its plan."""
    monkeypatch.chdir(tmp_path)
    four = ["--model.network.init_args.num_layers=4", "--model.distillation.max_loops=1"]
    once = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", *SMALL_SQUARES]
    assert main(["fit", "--config", QUICKSTART, *once, *four, "--run_dir=deep"]) == 0
    ckpt = "deep/checkpoints/last.ckpt"
    assert main(["export", f"--ckpt_path={ckpt}", "--output=exported", "--with_tokenizer"]) == 0
    make = ["loop", "--from", "exported", "--layers=2", "--loops=2", "--recall", "--output=loop"]
    assert main(make) == 0
    assert main(make) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert from_pretrained("loop").network.has_recall
    assert Path("loop/tokenizer.safetensors").is_file()
    assert main(["test", "--config=deep/config.yaml", f"--ckpt_path={ckpt}", "--loops=1"]) == 0
    # A config of its own says the data and how to train; the model is the folder's.
    Path("data.yaml").write_text(f"base: {QUICKSTART}\nmodel: {{distillation: {{max_loops: 2}}}}\n")
    teacher = [f"--model.outer_teacher.path={ckpt}", "--model.outer_teacher.weight=0.5"]
    begin = ["fit", "--config=data.yaml", *once, "--init_from=loop", *teacher, "--run_dir=looped"]
    assert main(begin) == 0
    said = capsys.readouterr().out
    assert "begins from loop: taken over" in said
    assert f"outer teacher: {ckpt}, weight 0.5" in said
    assert "fresh: nothing; left out: nothing" in said
    checkpoint = torch.load("looped/checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    assert checkpoint["elt"]["model"]["network"]["init_args"]["recall"] is True
    assert checkpoint["elt"]["model"]["outer_teacher"] == {"path": ckpt, "weight": 0.5}
    # What a run records of itself does the same again.
    assert main(["fit", "--config=looped/config.yaml", "--init_from=loop", "--run_dir=again"]) == 0
    again = torch.load("again/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in checkpoint["state_dict"].items())
    monkeypatch.chdir(tmp_path / "looped")  # a training may go on from another folder
    stored = with_stored_config(["--ckpt_path=checkpoints/last.ckpt"], Path.cwd())[1]
    assert yaml.safe_load(Path(stored).read_text())["model"]["outer_teacher"]["path"] == str(tmp_path / ckpt)
    stored = with_stored_config(["--init_from=checkpoints/last.ckpt"], Path.cwd())[1]
    assert "outer_teacher" not in yaml.safe_load(Path(stored).read_text())["model"]
    monkeypatch.chdir(tmp_path)
    assert main([*begin, f"--ckpt_path={ckpt}"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    plans = []
    for flags in ([], teacher):
        path = f"plan{len(flags)}.json"
        assert main(["plan", "--config=data.yaml", *once, "--init_from=loop", *flags, f"--json={path}"]) == 0
        plans.append(json.loads(Path(path).read_text()))
    weights = plans[1]["resident"]["the outer teacher's weights"]
    assert weights > 0
    assert plans[1]["memory"] == plans[0]["memory"] + weights
    assert plans[1]["image_macs"] > plans[0]["image_macs"]

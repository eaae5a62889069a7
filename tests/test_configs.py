"""Configs: bases, and that every shipped one builds what its name says."""

from pathlib import Path

import pytest
import torch
import yaml

from elt_lightning.cli import main
from elt_lightning.commands.plan import read
from elt_lightning.commands.settings import CONFIGS, with_bases
from elt_lightning.errors import UserError
from elt_lightning.tokenizers.vq_training import VQTraining

ROOT = Path(__file__).parent.parent
IMAGENET = sorted(
    path
    for path in (ROOT / "configs" / "imagenet256").glob("*.yaml")
    if path.stem not in ("masked", "diffusion", "smoke", "upcycling")  # not whole by themselves, or small
)


def layers(arguments: list[str], scratch: Path) -> list[dict[str, object]]:
    flags = with_bases(arguments, scratch)
    assert flags[::2] == ["--config"] * (len(flags) // 2)
    return [yaml.safe_load(Path(path).read_text()) for path in flags[1::2]]


def test_bases_come_first_and_configs_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "lowest.yaml").write_text("a: 1\n")
    (tmp_path / "middle.yaml").write_text("base: shared/lowest.yaml\na: 2\n")
    (tmp_path / "top.yaml").write_text("base: middle.yaml\na: 3\n")
    (tmp_path / "plain.yaml").write_text("a: 4\n")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    top, plain = str(tmp_path / "top.yaml"), str(tmp_path / "plain.yaml")
    assert layers(["--config", top, "--config=" + plain], scratch) == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]
    flags = with_bases(["--x=1", "--config", top, "--y", "2"], scratch)
    assert flags[0] == "--x=1"
    assert flags[-2:] == ["--y", "2"]
    assert Path(flags[-3]).name == "top.yaml"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: nowhere.yaml", r"nowhere\.yaml, the base of .*top\.yaml, cannot be read"),
        ("base: top.yaml", "its own base"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_base_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "top.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        with_bases(["--config", str(tmp_path / "top.yaml")], tmp_path)


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    assert "the config nowhere.yaml cannot be read" in capsys.readouterr().err


PUBLISHED = {
    "maskgit_l": (24, 1),
    "maskgit_xl": (28, 1),
    "elt_l_8n3l": (8, 3),
    "elt_l_8n3l_24gb": (8, 3),
    "elt_l_12n2l": (12, 2),
    "elt_xl_7n4l": (7, 4),
    "dit_16": (16, 1),
    "dit_32": (32, 1),
    "elt_1n32l": (1, 32),
    "elt_4n8l": (4, 8),
    "elt_8n4l": (8, 4),
    "elt_16n2l": (16, 2),
    "elt_l_8n3l_recall": (8, 3),
    "elt_xl_7n4l_recall": (7, 4),
    "elt_8n4l_recall": (8, 4),
}


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_rows_of_the_tables_are_what_they_are_called(path: Path) -> None:
    config, _, module = read(["--config", str(path)])
    assert (len(module.network.backbone.layers), module.max_loops) == PUBLISHED[path.stem]  # type: ignore[union-attr, arg-type]
    assert config["data"]["init_args"]["batch_size"] == 512
    assert module.distillation.mode == ("vanilla" if module.max_loops == 1 else "ilsd")
    assert module.class_dropout_prob == 0.1
    assert module.network.has_recall == path.stem.endswith("_recall")
    if "dit" in path.stem or config["trainer"]["max_steps"] == 500_000:
        assert (module.sampler.steps, module.sampler.guidance.scale) == (512, 3.0)
    else:
        assert (module.sampler.steps, config["trainer"]["max_epochs"]) == (24, 270)


def test_every_row_has_a_config() -> None:
    assert {path.stem for path in IMAGENET} == PUBLISHED.keys()


def test_table_4s_model_is_of_the_published_size() -> None:
    config, data, module = read(["--config", str(ROOT / "configs" / "ucf101" / "elt_6n4l.yaml")])
    backbone, total = module.num_parameters()
    _, _, recalling = read(["--config", str(ROOT / "configs" / "ucf101" / "elt_6n4l_recall.yaml")])
    assert recalling.num_parameters() == (backbone + 1, total + 1)  # β
    assert recalling.network.has_recall
    assert not module.network.has_recall
    assert backbone == pytest.approx(76e6, rel=0.01)
    assert total == pytest.approx(78.8e6, rel=0.01)
    assert (data.num_samples, module.max_loops, module.sampler.steps, module.class_dropout_prob) == (9537, 4, 12, 0.0)
    assert config["data"]["init_args"]["batch_size"] == 256
    # Table 4 gives multiply-accumulates: 4.3k GFLOPs at 4 loops and 12 steps, 13k at 6 loops and 24 steps.
    assert module.macs_per_sample(4) == pytest.approx(4.3e12, rel=0.02)
    assert 2 * module.macs_per_sample(6) == pytest.approx(13e12, rel=0.02)


def test_the_tokenizers_config_builds_magvits_network() -> None:
    section = yaml.safe_load((ROOT / "configs" / "ucf101" / "tokenizer.yaml").read_text())["model"]
    settings = {name: section["init_args"][name] for name in ("sample_shape", "filters")}
    with torch.device("meta"):
        training = VQTraining(**settings)
    assert training.network.settings.grid(training.sample_shape) == (4, 16, 16)
    assert training.network.settings.codebook_size == 1024


def test_a_config_that_is_not_here_is_the_one_that_came_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After ``pip install`` there is no ``configs/``; one that is there wins, and no other name is made up."""
    monkeypatch.chdir(tmp_path)
    _, base, _, top = with_bases(["--config=configs/quickstart_recall.yaml"], tmp_path)
    assert Path(base).read_text() == (CONFIGS / "quickstart.yaml").read_text()
    assert yaml.safe_load(Path(top).read_text())["model"]["network"]["init_args"]["recall"] is True
    assert f"{CONFIGS / 'quickstart_recall.yaml'}\n" in capsys.readouterr().out
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart_recall.yaml").write_text("run_dir: mine\n")
    assert with_bases(["--config", "configs/quickstart_recall.yaml"], tmp_path)[1] == "configs/quickstart_recall.yaml"
    for missing in (
        "configs/no.yaml",
        "quickstart.yaml",
        "other/quickstart.yaml",
        str(tmp_path / "configs" / "a.yaml"),
    ):
        with pytest.raises(UserError, match="cannot be read"):
            with_bases(["--config", missing], tmp_path)

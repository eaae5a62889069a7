"""The ImageNet data module and the commands on its shards: encode, fit, resume, test."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import write_class_folders
from imagenet_stand_ins import write_inception
from shard_files import token_index, write_shards
from test_command_line import assert_same, elt

from elt_lightning.cli import main
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.errors import UserError
from elt_lightning.processes.noise import sample_seeds

CONFIG = """
data:
  class_path: elt_lightning.data.imagenet.ImageNetDataModule
  init_args: {training_shards: train, val_shards: val, batch_size: 8, micro_batch_size: 4, num_workers: 1}
model:
  network:
    class_path: elt_lightning.networks.diffusion.LoopedDiT
    init_args: {num_layers: 1, patch_size: 4, width: 16, num_heads: 2}
  process: GaussianProcess
  objective: {class_path: elt_lightning.objectives.diffusion.DiffusionObjective}
  distillation: {max_loops: 2}
  sampler:
    class_path: elt_lightning.samplers.diffusion.DDIMSampler
    init_args: {steps: 3}
trainer: {max_steps: 13, check_val_every_n_epoch: null, val_check_interval: 100, accelerator: cpu}
checkpoint: {every_n_train_steps: 4, save_top_k: -1}
loop_metrics: {num_validation_samples: 0, num_samples: 7, batch_size: 4}
"""
ENCODE = ["encode", "imagenet", "--tokenizer=pixels", "--size=16", "--num_workers=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, their shards as pixels, and a config: 45 training pictures, an epoch of 5 steps."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_class_folders(folder / "pictures" / "train", per_class=15)
    write_class_folders(folder / "pictures" / "val", per_class=3)
    for name in ("train", "val"):
        where = [f"--root={folder / 'pictures' / name}", f"--output={folder / name}"]
        assert main([*ENCODE, *where, "--mirrored", "--samples_per_shard=7"]) == 0
    (folder / "small.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(autouse=True)
def _in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def fit(run_dir: str, *flags: str) -> Path:
    assert main(["fit", "--config", "small.yaml", "--run_dir", run_dir, *flags]) == 0
    return Path(run_dir) / "checkpoints"


@pytest.fixture(scope="module")
def checkpoints(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return home / fit("runs/whole")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_run_resumed_within_an_epoch_ends_with_the_same_weights(checkpoints: Path, num_workers: int) -> None:
    """An epoch is 5 steps of two passes each; checkpoints are written at steps 4, 8 and 12."""
    flag = f"--data.init_args.num_workers={num_workers}"
    whole = checkpoints if num_workers == 1 else fit(f"runs/whole_{num_workers}", flag)
    rest = fit(f"runs/from_8_{num_workers}", flag, f"--ckpt_path={whole / 'step_8.ckpt'}")
    assert_same(
        torch.load(whole / "last.ckpt", weights_only=True)["state_dict"],
        torch.load(rest / "last.ckpt", weights_only=True)["state_dict"],
    )


@pytest.mark.slow
def test_two_processes_train_to_the_end_and_measure_every_picture_once(checkpoints: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = elt("fit", "--config", "small.yaml", "--run_dir=runs/two", *two)
    assert done.returncode == 0, done.stderr
    assert torch.load("runs/two/checkpoints/last.ckpt", weights_only=True)["global_step"] == 13
    flags = ["test", "--config", "small.yaml", "--ckpt_path", str(checkpoints / "last.ckpt"), "--loops=2"]
    assert main([*flags, "--run_dir=runs/tested_by_one"]) == 0
    done = elt(*flags, *two, "--run_dir=runs/tested_by_two")
    assert done.returncode == 0, done.stderr
    one, other = (json.loads(Path(f"runs/tested_by_{name}/loops.json").read_text()) for name in ("one", "two"))
    assert other["rows"][0]["metrics"]["loss"]["mean"] == pytest.approx(
        one["rows"][0]["metrics"]["loss"]["mean"], rel=1e-4
    )


@pytest.mark.slow
def test_fid_and_inception_score_stand_in_the_sweep_and_samples_beside_it(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inception = write_inception(tmp_path / "inception.pth")
    data = [f"--data.init_args.inception_path={inception}", "--data.init_args.reference=pictures/val"]
    run_dir = tmp_path / "test"
    flags = ["--ckpt_path", str(checkpoints / "last.ckpt"), "--loops=2", f"--run_dir={run_dir}", "--reconstruction"]
    flags += [f"--data.init_args.cache={tmp_path / 'cache'}", "--save-samples", "samples.npz"]
    assert main(["test", "--config", "small.yaml", *data, *flags]) == 0
    report = json.loads((run_dir / "loops.json").read_text())
    assert report["primary_metric"] == "fid7"
    assert report["feature_network"] == "Inception-v3 (FID weights)" or "nception" in report["feature_network"]
    scores = report["rows"][0]["metrics"]
    assert scores.keys() >= {"fid7", "sfid7", "inception_score"}
    assert scores["fid7"]["mean"] > 0
    samples = np.load(run_dir / "samples_L2.npz", allow_pickle=False)
    assert samples["arr_0"].shape == (7, 16, 16, 3)
    assert samples["arr_0"].dtype == np.uint8
    assert samples["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    # Pixels survive encoding and decoding but for their rounding to float16: next to nothing is lost.
    reconstruction = json.loads((run_dir / "reconstruction.json").read_text())
    assert reconstruction["fid9"] < 0.01 * scores["fid7"]["mean"]
    assert "reconstruction: fid9" in capsys.readouterr().out


def test_a_tokenizer_is_measured_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config", "small.yaml", "--reconstruction", f"--run_dir={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "reconstruction.json").is_file()
    assert not (tmp_path / "run" / "loops.json").exists()


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(home)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()


def test_shards_are_read_from_urls(server: str, checkpoints: Path) -> None:
    urls = [f"--data.init_args.training_shards={server}/train", f"--data.init_args.val_shards={server}/val"]
    over_http = fit("runs/http", *urls)
    assert_same(
        torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"],
        torch.load(over_http / "last.ckpt", weights_only=True)["state_dict"],
    )


def test_a_url_without_shards_is_named(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", f"--data.init_args.training_shards={server}/nowhere"]) == 2
    assert "nowhere/index.json cannot be read" in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["fit", "--config", "small.yaml", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_shards_that_do_not_go_with_each_other_or_the_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = token_index([9])
    tokens = f"--data.init_args.training_shards={write_shards(tmp_path / 'tokens', index)}"
    assert "differ in classes: 3 and 3, or in another order" in refusal(capsys, tokens)
    fewer = write_shards(tmp_path / "fewer", replace(index, classes=index.classes[:2]))
    assert "differ in classes: 3 and 2" in refusal(capsys, tokens, f"--data.init_args.val_shards={fewer}")
    other = write_shards(tmp_path / "other", replace(index, tokenizer=index.tokenizer | {"sha256": "00"}))
    assert "different tokenizers" in refusal(capsys, tokens, f"--data.init_args.val_shards={other}")
    both = [tokens, f"--data.init_args.val_shards={tmp_path / 'tokens'}"]
    assert "(2, 2) is a grid of tokens" in refusal(capsys, *both)
    masked = [
        "--model.network.class_path=elt_lightning.networks.masked.LoopedMaskedTransformer",
        "--model.objective.class_path=elt_lightning.objectives.masked.MaskedObjective",
        "--model.sampler.class_path=elt_lightning.samplers.masked.MaskGITSampler",
    ]
    assert "codebook_size" in refusal(capsys, *masked)
    assert not list(Path("runs").glob("small_*"))  # refused before anything is written
    assert "fewer than batch_size 64: --data.init_args.batch_size=" in refusal(capsys, "--data.init_args.batch_size=64")
    assert "do not exist" in refusal(capsys, "--data.init_args.inception_path=nowhere.pth")


def test_a_checkpoint_of_another_tokenizers_codes_is_refused(
    home: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "val"):
        folder = tmp_path / name
        folder.mkdir()
        content = json.loads((home / name / "index.json").read_text())
        for shard in content["shards"]:
            (folder / shard["name"]).symlink_to(home / name / shard["name"])
        content["tokenizer"]["sha256"] = "another"
        (folder / "index.json").write_text(json.dumps(content))
    shards = [
        f"--data.init_args.{kind}_shards={tmp_path / name}" for kind, name in (("training", "train"), ("val", "val"))
    ]
    assert main(["fit", "--config", "small.yaml", *shards, "--ckpt_path", str(checkpoints / "step_4.ckpt")]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def module_of(tmp_path: Path, latent_scale: float | None, codebook_size: int | None) -> ImageNetDataModule:
    shape = (4,) if codebook_size else (4 if latent_scale is None else 8, 2, 2)
    index = replace(
        token_index([3]),
        stored_shape=shape,
        input_shape=(2, 2) if codebook_size else (4, 2, 2),
        codebook_size=codebook_size,
        latent_scale=latent_scale,
    )
    where = write_shards(tmp_path, index)
    return ImageNetDataModule(where, where)


def test_latents_are_drawn_from_their_moments_anew_at_every_step(tmp_path: Path) -> None:
    data = module_of(tmp_path, latent_scale=0.5, codebook_size=None)
    mean, std = torch.randn(20_000, 4, 2, 2), torch.rand(20_000, 4, 2, 2)
    seeds = sample_seeds(0, torch.arange(20_000))
    moments = torch.cat([mean, std], dim=1)
    drawn = data.codes(moments, seeds, 0)
    noise = (drawn / 0.5 - mean) / std
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert not torch.equal(drawn, data.codes(moments, seeds, 1))
    torch.testing.assert_close(data.codes(moments[7:9], seeds[7:9], 0), drawn[7:9])


def test_tokens_and_plain_latents_are_given_as_they_are(tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 2, 3, 4]], dtype=torch.int16)
    given = module_of(tmp_path / "tokens", None, 300).codes(tokens, sample_seeds(0, torch.arange(1)), 0)
    assert given.dtype == torch.int64
    assert torch.equal(given, tokens.long())
    latents = torch.randn(1, 4, 2, 2).half()
    given = module_of(tmp_path / "latents", None, None).codes(latents, sample_seeds(0, torch.arange(1)), 0)
    assert given.dtype == torch.float32
    assert torch.equal(given, latents.float())


def test_what_scores_matter_depends_on_what_was_given(home: Path) -> None:
    def settings(**more: str) -> tuple[str, bool]:
        data = ImageNetDataModule("train", "val", **more)  # type: ignore[arg-type]
        return data.primary_metric, data.higher_is_better

    assert settings() == ("loss", False)
    assert settings(inception_path="x") == ("inception_score", True)
    assert settings(inception_path="x", reference="y.npz") == ("fid", False)
    with pytest.raises(UserError, match="inception_path"):
        settings(reference="y.npz")
    with pytest.raises(ValueError, match="shuffle_block"):
        ImageNetDataModule("train", "val", shuffle_block=0)
    with pytest.raises(UserError, match=r"nowhere/index\.json"):
        ImageNetDataModule("nowhere", "val")

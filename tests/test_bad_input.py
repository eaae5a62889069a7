"""Wrong inputs of every kind, through the commands: each gives one clear line and status 2, and nothing is lost."""

import copy
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import draw, encoded, jpeg, write_class_folders, write_tar, write_tars
from safetensors.torch import load_file, save_file
from shard_files import add_member, npy, stored, token_index, write_shards

from elt_lightning.cli import end_of_loader, main
from elt_lightning.data.base import BatchDataset
from elt_lightning.data.workers import Loader
from elt_lightning.files import sha256

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
FASHION = QUICKSTART.with_name("fashion_diffusion.yaml")
Refused = Callable[[list[str], str], None]

SECONDS = 20
"""What takes longer is taken for a hang."""

LATENTS = """
data:
  class_path: elt_lightning.data.imagenet.ImageNetDataModule
  init_args: {training_shards: pixels, val_shards: null, batch_size: 4, num_workers: 0}
model:
  network:
    class_path: elt_lightning.networks.diffusion.LoopedDiT
    init_args: {num_layers: 1, patch_size: 4, width: 16, num_heads: 2}
  process: GaussianProcess
  objective: {class_path: elt_lightning.objectives.diffusion.DiffusionObjective}
  distillation: {max_loops: 2}
  sampler:
    class_path: elt_lightning.samplers.diffusion.DDIMSampler
    init_args: {steps: 2}
trainer: {max_steps: 2, check_val_every_n_epoch: null, val_check_interval: 100, accelerator: cpu, logger: false}
loop_metrics: {num_validation_samples: 0, num_samples: 4, batch_size: 4}
"""
TOKENS = """
data:
  class_path: elt_lightning.data.imagenet.ImageNetDataModule
  init_args: {training_shards: tokens, val_shards: tokens, batch_size: 4, num_workers: 0}
model:
  network:
    class_path: elt_lightning.networks.masked.LoopedMaskedTransformer
    init_args: {num_layers: 1, width: 16, num_heads: 2}
  process: MaskingProcess
  objective: {class_path: elt_lightning.objectives.masked.MaskedObjective}
  distillation: {max_loops: 2}
  sampler: {class_path: elt_lightning.samplers.masked.MaskGITSampler}
trainer: {max_steps: 4, check_val_every_n_epoch: null, val_check_interval: 100, accelerator: cpu, logger: false}
loop_metrics: {num_validation_samples: 0}
"""
INDEX = token_index([8, 8])
ENCODE = ["encode", "imagenet", "--tokenizer=pixels", "--size=8", "--num_workers=0"]


def cases(inputs: dict[str, Any]) -> list[Any]:
    """Name each input; every third is a fast test, and the others, of which each costs a command too, are slow."""
    marks = [[], [pytest.mark.slow], [pytest.mark.slow]]
    return [pytest.param(value, id=name, marks=marks[i % 3]) for i, (name, value) in enumerate(inputs.items())]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, encoded sets, configs, a trained model and its export."""
    folder = tmp_path_factory.mktemp("bad_input")
    write_class_folders(folder / "pictures", per_class=4)
    write_tars(folder / "tars")
    write_shards(folder / "tokens", INDEX)
    index = json.loads((folder / "tokens" / "index.json").read_text())
    for shard in index["shards"]:
        shard.pop("crc32", None)  # as in older sets: what is spoiled is to be found by what it is, not by a checksum
    (folder / "tokens" / "index.json").write_text(json.dumps(index))
    (folder / "latents.yaml").write_text(LATENTS)
    (folder / "tokens.yaml").write_text(TOKENS)
    (folder / "notes.txt").write_text("What was there before.\n")
    os.mkfifo(folder / "fifo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*ENCODE, "--root=pictures", "--output=pixels"]) == 0
        assert main(["fit", "--config=latents.yaml", "--run_dir=trained"]) == 0
        assert main(["fit", "--config=tokens.yaml", "--run_dir=of_tokens"]) == 0
        assert main(["export", "--ckpt_path=trained/checkpoints/last.ckpt", "--output=exported"]) == 0
    return folder


@pytest.fixture
def refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[list[str], str], None]]:
    """Run a command that must end with status 2 and one line that tells why, and change no file that was there."""
    monkeypatch.chdir(home)
    known = set(home.rglob("*"))

    def run(arguments: list[str], telling: str) -> None:
        before = fingerprints(home)
        capsys.readouterr()
        with at_most(SECONDS):
            status = main(arguments)
        check(status, capsys.readouterr().err, telling)
        after = fingerprints(home)
        assert {path: after.get(path) for path in before} == before

    yield run
    for path in sorted(set(home.rglob("*")) - known, reverse=True):  # what lies in a folder goes before it
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"no answer after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(status: int, error: str, telling: str) -> None:
    complaints = [line for line in error.splitlines() if line.startswith("elt: error: ")]
    assert (status, len(complaints)) == (2, 1), error
    assert "Traceback" not in error
    assert len(complaints[0]) < 2100
    assert "\x1b" not in complaints[0]
    assert telling
    assert telling in complaints[0]


def fingerprints(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


FIT = ["fit", "--config=tokens.yaml"]
SAMPLE = ["sample", "--ckpt_path=trained/checkpoints/last.ckpt", "--num=1", "--output=grid.png"]
COMMAND_LINES: dict[str, tuple[list[str], str]] = {
    "no such command": (["smaple"], "did you mean sample"),
    "a command in capitals": (["FIT"], "FIT"),
    "a command that is a path": (["../fit"], "../fit"),
    "a flag for a command": (["--config", "tokens.yaml"], "--config"),
    "fit without a config": (["fit"], "required"),
    "fit with a config that is not there": (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
    "fit with a folder as config": (["fit", "--config=pixels"], "pixels"),
    "fit with a config and no name after it": (["fit", "--config"], "--config"),
    "fit with an unknown flag": ([*FIT, "--model.distillation.max_lops=3"], "max_lops"),
    "fit with a lone word": ([*FIT, "tokens.yaml"], "tokens.yaml"),
    "fit for a number that is a word": ([*FIT, "--trainer.max_steps=ten"], "ten"),
    "fit for a number that is no number": ([*FIT, "--model.optimizer.init_args.lr=fast"], "fast"),
    "fit into a folder that has a run": ([*FIT, "--run_dir=trained"], "already holds a run"),
    "fit into a file": ([*FIT, "--run_dir=notes.txt"], "notes.txt"),
    "fit into a folder below a file": ([*FIT, "--run_dir=notes.txt/run"], "notes.txt"),
    "fit on a device that is not there": ([*FIT, "--trainer.accelerator=cuda"], "CUDAAccelerator"),
    "fit on an accelerator that nobody has": ([*FIT, "--trainer.accelerator=abacus"], "abacus"),
    "fit in a precision that is none": ([*FIT, "--trainer.precision=7"], "precision"),
    "fit on no devices": ([*FIT, "--trainer.devices=0"], "devices"),
    "fit from a checkpoint of another model": (
        [*FIT, "--ckpt_path=trained/checkpoints/last.ckpt", "--run_dir=new"],
        "the checkpoint is of another network",
    ),
    "fit from a checkpoint of another optimiser": (
        [
            *["fit", "--ckpt_path=trained/checkpoints/last.ckpt", "--run_dir=new", "--trainer.max_steps=3"],
            *["--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.lr=0.1"],
        ],
        "another optimiser",
    ),
    "fit on with settings that cannot change": (
        [
            *["fit", "--ckpt_path=trained/checkpoints/last.ckpt", "--run_dir=new", "--trainer.max_steps=3"],
            "--model.optimizer.init_args.amsgrad=true",
        ],
        "exp_avg, exp_avg_sq, max_exp_avg_sq, step",
    ),
    "fit with batches accumulated": ([*FIT, "--trainer.accumulate_grad_batches=2"], "micro_batch_size"),
    "fit with a folder of the trainer": ([*FIT, "--trainer.default_root_dir=new"], "--run_dir"),
    "fit to few batches": ([*FIT, "--trainer.overfit_batches=1"], "overfit_batches cannot be set"),
    "fit with Lightning's samplers": ([*FIT, "--trainer.use_distributed_sampler=true"], "use_distributed_sampler"),
    "fit with nothing around": ([*FIT, "--trainer.barebones=true"], "`elt bench`"),
    "fit without checkpoints": ([*FIT, "--trainer.enable_checkpointing=false"], "fast_dev_run"),
    "fit looking for a learning rate": ([*FIT, "--trainer.callbacks=LearningRateFinder"], "init_args.lr"),
    "fit monitoring what no validation logs": (
        [*FIT, "--checkpoint.monitor=val/loss@L1", "--trainer.limit_val_batches=0"],
        "without validation",
    ),
    "fit stopping by what no validation logs": (
        [*FIT, "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/lss@L1"],
        "nothing is logged as val/lss@L1, to be monitored: there are loops/token_cosine@L1, ",
    ),
    "fit from an exported model": ([*FIT, "--ckpt_path=exported"], "exported model"),
    "fit with weights of no kind": ([*FIT, "--weights=best"], "best"),
    "test without a checkpoint": (["test", "--config=tokens.yaml"], "--ckpt_path"),
    "test at no loops": (["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--loops=0"], "loops"),
    "test at loops that are words": (["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--loops=all"], "loops"),
    "test at a gap": (["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--loops=1,,2"], "loops"),
    "test from 4 to 1 loops": (["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--loops=4-1"], "loops"),
    "test of one sample": (["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--num_samples=1"], "num_samples"),
    "test with samples in a text file": (
        ["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--save_samples=a.txt"],
        ".npz",
    ),
    "predict in no format": (["predict", "--ckpt_path=trained/checkpoints/last.ckpt", "--samples.format=bmp"], "bmp"),
    "sample of a seed beyond 32 bits": ([*SAMPLE, "--seed=2147483648"], "not a whole number from 0 to 2147483647"),
    "sample of a seed of endless digits": ([*SAMPLE, f"--seed={'9' * 5000}"], "[…]"),
    "sample of more than any machine holds": ([*SAMPLE, "--num=1000000000"], "--num"),
    "sample at more loops than anybody waits for": ([*SAMPLE, "--loops=1000000000"], "--loops"),
    "plan of more loops than anybody measures": (
        ["plan", f"--config={QUICKSTART}", "--model.distillation.max_loops=1000000"],
        "say which, as in --loop_metrics.loops=1,1000000",
    ),
    "fit at more loops than memory holds": (
        ["fit", f"--config={QUICKSTART}", "--model.distillation.max_loops=1000000", "--loop_metrics.loops=1"],
        "a pass of 64 samples at max_loops 1000000 needs",
    ),
    "fit on more squares than memory holds": (
        ["fit", f"--config={QUICKSTART}", "--data.init_args.num_train=10000000000"],
        "num_train 10000000000 needs 59,605 GiB of memory: there are",
    ),
    "fit on devices that nobody has": ([*FIT, "--trainer.devices=1000000000"], "devices must be at most 100000"),
    "test of more samples than anybody waits for": (
        ["test", "--ckpt_path=trained/checkpoints/last.ckpt", "--num_samples=1000000", "--repeats=1000"],
        "num_samples must be at most 100000000, not 1000000000",
    ),
    "predict of more samples than anybody waits for": (
        ["predict", "--ckpt_path=trained/checkpoints/last.ckpt", "--num_samples=1000000000"],
        "num_samples must be at most 100000000, not 1000000000",
    ),
    "predict at more loops than anybody waits for": (
        ["predict", "--ckpt_path=trained/checkpoints/last.ckpt", "--loops=1000000000"],
        "loops must be at most 1000000, not 1000000000",
    ),
    "test of a FIFO": (["test", "--ckpt_path=fifo"], "fifo: it is a FIFO"),
    "sample of a FIFO": (["sample", "--ckpt_path=fifo"], "fifo: it is a FIFO"),
    "stats with a FIFO as network": (
        ["stats", "--images=pictures", "--size=8", "--inception_path=fifo", "--output=new.npz"],
        "fifo: it is a FIFO",
    ),
    "sample without a checkpoint": (["sample"], "--ckpt_path"),
    "sample of a class there is not": ([*SAMPLE, "--classes=3"], "0 to 2"),
    "sample of a class below 0": ([*SAMPLE, "--classes=-1"], "--classes"),
    "sample of no pictures": ([*SAMPLE, "--num=0"], "--num"),
    "sample at a gap": ([*SAMPLE, "--loops=1,,2"], "--loops"),
    "sample from 4 to 1 loops": ([*SAMPLE, "--loops=4-1"], "--loops"),
    "sample at loops in other digits": ([*SAMPLE, "--loops=²"], "--loops"),
    "sample at half a loop": ([*SAMPLE, "--loops=0.5"], "--loops"),
    "sample with guidance by word": ([*SAMPLE, "--guidance=much"], "--guidance"),
    "sample with guidance that is not finite": ([*SAMPLE, "--guidance=nan"], "guidance"),
    "sample on a device that is not there": ([*SAMPLE, "--device=cuda:9"], "cuda:9"),
    "sample on a device of no kind": ([*SAMPLE, "--device=toaster"], "toaster"),
    "sample over what is there": ([*SAMPLE, "--output=notes.txt"], "exists"),
    "sample into a folder": ([*SAMPLE, "--output=pixels", "--overwrite"], "pixels"),
    "sample below a file": ([*SAMPLE, "--output=notes.txt/grid.png"], "notes.txt"),
    "sample as a text": ([*SAMPLE, "--output=grid.docx"], "docx"),
    "sample of weights that were not exported": ([*SAMPLE, "--ckpt_path=exported", "--weights=raw"], "ema weights"),
    "export without a folder": (["export", "--ckpt_path=trained/checkpoints/last.ckpt"], "--output"),
    "export into a file": (["export", "--ckpt_path=trained/checkpoints/last.ckpt", "--output=notes.txt"], "notes.txt"),
    "export over another": (["export", "--ckpt_path=trained/checkpoints/last.ckpt", "--output=exported"], "exported"),
    "encode of nothing": (["encode"], "KIND"),
    "encode with a tokenizer that is none": (
        ["encode", "imagenet", "--root=pictures", "--output=new", "--tokenizer=json.JSONDecoder"],
        "not an ImageTokenizer",
    ),
    "encode with a tokenizer of a missing package": (
        ["encode", "imagenet", "--root=pictures", "--output=new", "--tokenizer=nowhere.Tokenizer"],
        "nowhere",
    ),
    "encode with a tokenizer's file missing": (
        ["encode", "imagenet", "--root=pictures", "--output=new", "--tokenizer=maskgit-vqgan", "--tokenizer_path=no"],
        "no",
    ),
    "encode with a file for a tokenizer without one": (
        [*ENCODE, "--root=pictures", "--output=new", "--tokenizer_path=notes.txt"],
        "--tokenizer_path",
    ),
    "encode from a folder that is not there": ([*ENCODE, "--root=nowhere", "--output=new"], "nowhere"),
    "encode into its own pictures": ([*ENCODE, "--root=pictures", "--output=pictures/new"], "lies in --root"),
    "encode into another program's folder": ([*ENCODE, "--root=pictures", "--output=tars"], "did not write"),
    "encode into a file": ([*ENCODE, "--root=pictures", "--output=notes.txt"], "notes.txt"),
    "encode on with other settings": ([*ENCODE, "--root=pictures", "--output=pixels", "--mirrored"], "mirrored"),
    "encode a share that is not there": ([*ENCODE, "--root=pictures", "--output=new", "--shard=4/4"], "4/4"),
    "encode to pictures without a side": ([*ENCODE, "--root=pictures", "--output=new", "--size=0"], "--size"),
    "encode with classes of no set": (
        [*ENCODE, "--root=pictures", "--output=new", "--classes_from=tars"],
        "index.json",
    ),
    "encode with labels that are not there": (
        [*ENCODE, "--root=pictures", "--output=new", "--labels=no.txt"],
        "no.txt",
    ),
    "encode with labels of other pictures": (
        [*ENCODE, "--root=pictures", "--output=new", "--labels=notes.txt"],
        "notes.txt",
    ),
    "stats of no pictures": (
        ["stats", "--images=nowhere", "--size=8", "--inception_path=notes.txt", "--output=new.npz"],
        "notes.txt",
    ),
    "test of nothing": (["test"], "model.network, model.process"),
    "predict from nothing": (["predict"], "--ckpt_path PATH, of a trained model"),
    "test of a model that comes along, by name": (["test", "--ckpt_path=squares"], "that comes along is"),
    "sample over a folder": (["sample", "--model=squares", "--output=pictures", "--overwrite"], "pictures is a folder"),
    "a folder of IDX files that is not there": (
        ["fit", f"--config={FASHION}", "--data.init_args.root=nowhere"],
        "there is no nowhere",
    ),
    "plan of no config": (["plan"], "needs a config: --config PATH"),
    "plan on no devices": (["plan", "--config=tokens.yaml", "--devices=0"], "--devices"),
    "bench with half a worker": (["bench", "data", "--num_workers=0.5"], "--num_workers"),
}


@pytest.mark.parametrize("case", cases(COMMAND_LINES))
def test_command_lines(case: tuple[list[str], str], refused: Refused) -> None:
    refused(*case)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bad.yaml"),
    "a word": (b"fit", "bad.yaml"),
    "a list": (b"- model\n- data\n", "bad.yaml"),
    "a number": (b"42", "bad.yaml"),
    "not utf-8": (b"seed_everything: \xff\xfe\n", "cannot be read"),
    "zeros": (bytes(64), "cannot be read"),
    "half of it": (TOKENS.encode()[:300], "cannot be read"),
    "indented with tabs": (b"model:\n\tnetwork: 1\n", "cannot be read"),
    "a tag that runs code": (b"model: !!python/object/apply:os.system ['touch ran']\n", "cannot be read"),
    "aliases that stand for a billion values": (
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 107)),
        "aliases",
    ),
    "an alias of itself": (b"model: &model {network: *model}\n", "aliases"),
    "a checkpoint, perhaps with code in it": (b"base: tokens.yaml\nckpt_path: http://localhost/evil.ckpt\n", "names a"),
    "a seed that is yes": (f"seed_everything: true\n{TOKENS}".encode(), "seed: expected a whole number, not True"),
    "a limit of steps that are not finite below 1": (
        b"base: tokens.yaml\nfinite_steps: {max_in_a_row: 0}\n",
        "max_in_a_row",
    ),
    "epochs between validations and steps too": (
        b"base: tokens.yaml\ntrainer: {check_val_every_n_epoch: 9}\n",
        "val_check_interval",
    ),
    "its own base": (b"base: bad.yaml\n", "its own base"),
    "a base that is not there": (b"base: nowhere.yaml\n", "nowhere.yaml"),
    "a base that is a list": (b"base: [tokens.yaml]\n", "['tokens.yaml'], the base of bad.yaml, cannot be read"),
    "a section of no program": (b"base: tokens.yaml\nmodle: {network: 1}\n", "modle"),
    "no model": (b"base: tokens.yaml\nmodel: null\n", "model"),
    "a model that is a list": (b"base: tokens.yaml\nmodel: []\n", "model"),
    "no data": (TOKENS.replace("data:", "no_data:").encode(), "no_data"),
    "a class that is not there": (TOKENS.replace("MaskGITSampler", "MaskGITSampling").encode(), "MaskGITSampling"),
    "a package that is not there": (TOKENS.replace("elt_lightning.samplers", "elt_samplers").encode(), "elt_samplers"),
    "a class of another kind": (
        TOKENS.replace("elt_lightning.samplers.masked.MaskGITSampler", "torch.nn.Linear").encode(),
        "torch.nn.Linear",
    ),
    "a function for a class": (
        TOKENS.replace("elt_lightning.objectives.masked.MaskedObjective", "os.system").encode(),
        "os.system",
    ),
    "an abstract class": (
        TOKENS.replace(
            "elt_lightning.samplers.masked.MaskGITSampler}",
            "elt_lightning.samplers.base.Sampler, init_args: {steps: 2}}",
        ).encode(),
        "Sampler is abstract: choose a class of that kind, DDIMSampler, DDPM",
    ),
    "an abstract class that the parser knows": (
        TOKENS.replace("elt_lightning.networks.masked.LoopedMaskedTransformer", "LoopedNetwork").encode(),
        "model.network: LoopedNetwork is abstract: choose a class of that kind, LoopedDiT, LoopedMasked",
    ),
    "hidden units that this machine cannot hold": (
        TOKENS.replace("num_heads: 2", "num_heads: 2, mlp_width: 10_000_000_000").encode(),
        "a network of num_layers 1, width 16 and mlp_width 10000000000 needs 1,192 GiB of memory",
    ),
    "loader processes that no machine has": (
        TOKENS.replace("num_workers: 0", "num_workers: 1_000_000").encode(),
        "num_workers must be at most 1000, not 1000000",
    ),
    "steps of sampling that nobody waits for": (
        LATENTS.replace("steps: 2}", "steps: 1_000_000_000}").encode(),
        "steps must be at most 1000000",
    ),
    "a network without its settings": (TOKENS.replace(", width: 16, num_heads: 2", "").encode(), "width"),
    "a width below 0": (TOKENS.replace("width: 16", "width: -16").encode(), "width must be at least 1, not -16"),
    "no width": (LATENTS.replace("width: 16", "width: 0").encode(), "width must be at least 1, not 0"),
    "no heads": (TOKENS.replace("num_heads: 2", "num_heads: 0").encode(), "num_heads must be at least 1, not 0"),
    "num_heads below 0": (
        LATENTS.replace("num_heads: 2", "num_heads: -2").encode(),
        "num_heads must be at least 1, not -2",
    ),
    "no heads beside a scale": (
        TOKENS.replace("width: 16, num_heads: 2", "scale: B, num_heads: 0").encode(),
        "num_heads must be at least 1, not 0",
    ),
    "no hidden units": (
        TOKENS.replace("num_heads: 2", "num_heads: 2, mlp_width: 0").encode(),
        "mlp_width must be at least 1, not 0",
    ),
    "no width of the condition": (
        LATENTS.replace("num_heads: 2", "num_heads: 2, condition_width: 0").encode(),
        "condition_width must be at least 1, not 0",
    ),
    "no channels to give": (
        LATENTS.replace("num_heads: 2", "num_heads: 2, out_channels: 0").encode(),
        "out_channels must be",
    ),
    "fewer than no layers before the loop": (
        TOKENS.replace("num_heads: 2", "num_heads: 2, prelude_layers: -1").encode(),
        "prelude_layers must be at least 0, not -1",
    ),
    "patches of no side": (LATENTS.replace("patch_size: 4", "patch_size: 0").encode(), "patch_size 0"),
    "patches of a side below 0": (LATENTS.replace("patch_size: 4", "patch_size: -4").encode(), "patch_size -4"),
    "patches with one side too few": (LATENTS.replace("patch_size: 4", "patch_size: [4]").encode(), "patch_size"),
    "a width that no machine has": (
        TOKENS.replace("width: 16", "width: 1_000_000_000").encode(),
        "no machine has the memory",
    ),
    "layers that no machine has": (
        LATENTS.replace("num_layers: 1", "num_layers: 1_000_000_000").encode(),
        "no machine has the memory",
    ),
    "loops that no machine has": (
        TOKENS.replace("max_loops: 2", "max_loops: 1_000_000_000").encode(),
        "max_loops must be at most 1000000, not 1000000000",
    ),
    "num_heads that do not divide the width": (TOKENS.replace("num_heads: 2", "num_heads: 3").encode(), "num_heads"),
    "dropout that is no number": (
        TOKENS.replace("num_heads: 2", "num_heads: 2, dropout: .nan").encode(),
        "dropout must lie",
    ),
    "weights that begin alike": (
        TOKENS.replace("num_heads: 2", "num_heads: 2, initial_std: 0").encode(),
        "initial_std must be",
    ),
    "a residual of no size": (
        TOKENS.replace("num_heads: 2", "num_heads: 2, residual_scale: .inf").encode(),
        "residual_scale and initial_std must be",
    ),
    "classes spread by less than nothing": (
        LATENTS.replace("num_heads: 2", "num_heads: 2, class_std: -1").encode(),
        "class_std must be at least 0",
    ),
    "validation all the time": (
        TOKENS.replace("val_check_interval: 100", "val_check_interval: 0").encode(),
        "val_check_interval must be above 0",
    ),
    "no layers": (TOKENS.replace("num_layers: 1", "num_layers: 0").encode(), "num_layers must be at least 1, not 0"),
    "layers below 0": (LATENTS.replace("num_layers: 1", "num_layers: -1").encode(), "num_layers must be at least 1"),
    "no loops": (TOKENS.replace("max_loops: 2", "max_loops: 0").encode(), "max_loops 0"),
    "loops below 0": (LATENTS.replace("max_loops: 2", "max_loops: -2").encode(), "max_loops -2"),
    "half a loop": (TOKENS.replace("max_loops: 2", "max_loops: 1.5").encode(), "max_loops"),
    "a batch of nothing": (TOKENS.replace("batch_size: 4", "batch_size: 0").encode(), "batch"),
    "a batch larger than the data": (TOKENS.replace("batch_size: 4", "batch_size: 400").encode(), "400"),
    "a batch that does not split": (
        TOKENS.replace("batch_size: 4", "batch_size: 4, micro_batch_size: 3").encode(),
        "does not split",
    ),
    "workers below 0": (TOKENS.replace("num_workers: 0", "num_workers: -1").encode(), "num_workers"),
    "no steps": (TOKENS.replace("max_steps: 4", "max_steps: -1").encode(), "max_steps"),
    "a masked model of continuous data": (TOKENS.replace("tokens", "pixels").encode(), "codebook_size"),
    "a diffusion model of tokens": (LATENTS.replace("pixels", "tokens").encode(), "tokens"),
    "a seed below 0": (f"seed_everything: -1\n{TOKENS}".encode(), "seed"),
    "a seed that is a word": (f"seed_everything: lucky\n{TOKENS}".encode(), "seed_everything"),
    "an optimiser that is none": (b"base: tokens.yaml\nmodel: {optimizer: torch.nn.ReLU}\n", "optimizer"),
    "a callback that is none": (b"base: tokens.yaml\ntrainer: {callbacks: [nowhere.Callback]}\n", "nowhere"),
    "a negative learning rate": (
        b"base: tokens.yaml\nmodel: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: -1.0}}}\n",
        "learning rate",
    ),
    "validation more often than there are steps": (
        b"base: tokens.yaml\ntrainer: {val_check_interval: 2.5}\n",
        "val_check_interval",
    ),
    "metrics to monitor that nobody logs": (
        b"base: tokens.yaml\ntrainer: {val_check_interval: 2}\ncheckpoint: {monitor: val/nothing}\n",
        "nothing is logged as val/nothing",
    ),
}


@pytest.mark.parametrize("case", cases(CONFIGS))
def test_configs(case: tuple[bytes, str], home: Path, refused: Refused) -> None:
    content, telling = case
    (home / "bad.yaml").write_bytes(content)
    refused(["fit", "--config=bad.yaml"], telling)
    assert not (home / "ran").exists()


def member(number: int = 0, codes: bytes | None = None, about: bytes | None = None) -> list[tuple[str, bytes]]:
    """The two members of a sample, one of them spoiled."""
    return [
        (f"{number:09d}.codes.npy", npy(stored(number, INDEX)) if codes is None else codes),
        (f"{number:09d}.json", json.dumps({"label": 0, "source": "x"}).encode() if about is None else about),
    ]


def tar_of(*members: tuple[str, bytes]) -> bytes:
    """A shard of eight samples: these members, and whole samples after them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            add_member(tar, name, content)
        for number in range(1, 8):
            for name, content in member(number):
                add_member(tar, name, content)
    return file.getvalue()


def labelled(label: object) -> bytes:
    return tar_of(*member(about=json.dumps({"label": label, "source": "x"}).encode()))


def header(text: str) -> bytes:
    """A .npy file with this header and no content to speak of."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64)


class Evil:
    """A pickle of it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([[Evil()]], dtype=object), allow_pickle=True)
    return file.getvalue()


def links() -> bytes:
    """A shard whose first codes are a link to a file outside."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo("000000000.codes.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add_member(tar, *member()[1])
    return file.getvalue()


GOOD = tar_of(*member())
SHARDS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"0",
    "zeros": bytes(10240),
    "a text": b"This is no tar.\n" * 1000,
    "a zip": b"PK\x03\x04" + bytes(2048),
    "cut within the first header": GOOD[:100],
    "cut after the first header": GOOD[:512],
    "cut within the first codes": GOOD[:600],
    "cut within the padding of the codes": GOOD[:900],
    "cut between codes and label": GOOD[:1024],
    "cut within the label's header": GOOD[:1200],
    "cut within the label": GOOD[:1550],
    "cut between two samples": GOOD[: 4 * 512],
    "cut in the middle": GOOD[: 4 * 2048 + 700],
    "a header overwritten": GOOD[: 8 * 512] + bytes([255]) * 512 + GOOD[9 * 512 :],
    "zeros in the middle": GOOD[: 8 * 512] + bytes(1024) + GOOD[10 * 512 :],
    "codes overwritten": GOOD[:512] + bytes([255]) * 512 + GOOD[1024:],
    "a length that is no number": GOOD[:124] + b"z" * 11 + GOOD[135:],
    "a length beyond the end": GOOD[:124] + b"77777777777" + GOOD[135:],
    "codes alone": tar_of(member()[0], *member(0)[:0]),
    "a label alone": tar_of(member()[1]),
    "members of other names": tar_of(("000000000.picture.jpg", b"x"), ("000000000.txt", b"x")),
    "a number that is a word": tar_of(("first.codes.npy", member()[0][1]), ("first.json", member()[1][1])),
    "a pickle for codes": tar_of(*member(codes=pickled())),
    "a pickle beside codes": tar_of(("000000000.pkl", pickle.dumps(Evil())), ("000000000.pyd", pickle.dumps(Evil()))),
    "names that climb out": tar_of(("../../../evil.codes.npy", b"x"), ("../../../evil.json", b"x")),
    "names from the root": tar_of(("/tmp/evil.codes.npy", b"x"), ("/tmp/evil.json", b"x")),
    "a link for codes": links(),
    "codes of another shape": tar_of(*member(codes=npy(np.zeros((1, 5), np.int16)))),
    "codes of more copies": tar_of(*member(codes=npy(np.zeros((2, 4), np.int16)))),
    "codes of words": tar_of(*member(codes=npy(np.array([list("abcd")])))),
    "codes in Fortran's order": tar_of(*member(codes=npy(np.asfortranarray(np.zeros((2, 4), np.int16))))),
    "codes without bytes": tar_of(*member(codes=b"")),
    "codes without content": tar_of(*member(codes=npy(stored(0, INDEX))[:-3])),
    "codes of no format": tar_of(*member(codes=b"\x93NUMPY\x09\x00" + bytes(64))),
    "codes with code for a header": tar_of(*member(codes=header("__import__('os').system('touch ran')\n"))),
    "codes with a header that does not end": tar_of(*member(codes=header("{'descr': '<i2', 'shape': (4,\n"))),
    "codes with an endless shape": tar_of(
        *member(codes=header("{'descr': '<i2', 'fortran_order': False, 'shape': (9999999999999, 4)}\n"))
    ),
    "codes above the codebook": tar_of(*member(codes=npy(np.full((1, 4), 300, np.int16)))),
    "codes below 0": tar_of(*member(codes=npy(np.full((1, 4), -1, np.int16)))),
    "codes that are fractions": tar_of(*member(codes=npy(np.full((1, 4), 0.5, np.float16)))),
    "a label above the classes": labelled(3),
    "a label below 0": labelled(-1),
    "a label that is a word": labelled("dog"),
    "a label that is nothing": labelled(None),
    "a label that is a fraction": labelled(0.5),
    "a label that is a list": labelled([1]),
    "a label that is no number": tar_of(*member(about=b'{"label": NaN}')),
    "a label that is infinite": tar_of(*member(about=b'{"label": Infinity}')),
    "no label": tar_of(*member(about=b"{}")),
    "a label's file cut": tar_of(*member(about=b'{"label": 1, "sou')),
    "a label's file that is a list": tar_of(*member(about=b"[1]")),
    "a label's file not in utf-8": tar_of(*member(about=b'{"label": 1, "source": "\xff\xfe"}')),
    "a label's file nested without end": tar_of(*member(about=b"[" * 100_000)),
}


@pytest.mark.parametrize("content", cases(SHARDS))
def test_shards(content: bytes, home: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(home / "tokens", tmp_path / "shards")
    (tmp_path / "shards" / "00000.tar").write_bytes(content)
    refused([*FIT, f"--data.init_args.training_shards={tmp_path / 'shards'}"], "shards")
    assert not (home / "ran").exists()
    assert not list(tmp_path.parent.rglob("evil*"))


def test_latents_that_are_not_finite(home: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(home / "pixels", tmp_path / "shards")
    with tarfile.open(home / "pixels/00000.tar") as whole, tarfile.open(tmp_path / "shards/00000.tar", "w") as tar:
        for info in whole:
            content = whole.extractfile(info).read()  # type: ignore[union-attr]
            if info.name.endswith(".npy"):
                content = npy(np.full_like(np.load(io.BytesIO(content)), np.nan))
            add_member(tar, info.name, content)
    refused(
        ["fit", "--config=latents.yaml", f"--data.init_args.training_shards={tmp_path / 'shards'}"], "not all finite"
    )


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda index: index.pop(key)


def setting(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index.update(values)


INDICES: dict[str, Callable[[dict[str, Any]], object]] = {
    "without a version": without("version"),
    "of a newer version": setting(version=99),
    "of a version that is a word": setting(version="new"),
    "without shards": without("shards"),
    "with no shards": setting(shards=[]),
    "with shards that are numbers": setting(shards=[1, 2]),
    "with a shard that is missing": lambda index: index["shards"].append({"name": "00002.tar", "num_samples": 8}),
    "with a shard that climbs out": lambda index: index["shards"][0].update(name="../../evil.tar"),
    "with a shard from the root": lambda index: index["shards"][0].update(name="/etc/passwd"),
    "with a shard that runs a command": lambda index: index["shards"][0].update(name="pipe:touch ran"),
    "with a count below 0": lambda index: index["shards"][0].update(num_samples=-1),
    "with too high a count": lambda index: index["shards"][0].update(num_samples=9),
    "with a count that is a word": lambda index: index["shards"][0].update(num_samples="many"),
    "with a count without end": lambda index: index["shards"][0].update(num_samples=float("inf")),
    "with no classes": setting(classes=[]),
    "with fewer classes than labels": setting(classes=["a", "b"]),
    "with codes of nothing": setting(stored_shape=[]),
    "with codes of another shape": setting(stored_shape=[5]),
    "with a grid of another size": setting(input_shape=[3, 3]),
    "with a smaller codebook": setting(codebook_size=3),
    "with a codebook that is a word": setting(codebook_size="large"),
    "with no copies": setting(copies=0),
    "with a tokenizer that is a word": setting(tokenizer="pixels"),
}


@pytest.mark.parametrize("spoil", cases(INDICES))
def test_indices(spoil: Callable[[dict[str, Any]], object], home: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(home / "tokens", folder)
    content = json.loads((folder / "index.json").read_text())
    spoil(content)
    (folder / "index.json").write_text(json.dumps(content))
    sets = [f"--data.init_args.{kind}_shards={folder}" for kind in ("training", "val")]
    refused([*FIT, *sets, "--trainer.max_steps=40"], "shards")
    assert not (home / "ran").exists()


NO_JSON: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"version": 1, "sha',
    "a list": b"[]",
    "null": b"null",
    "a word": b'"index"',
    "not utf-8": b'{"version": "\xff\xfe"}',
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("content", cases(NO_JSON))
def test_indices_that_are_none(content: bytes, home: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(home / "tokens", tmp_path / "shards")
    (tmp_path / "shards" / "index.json").write_bytes(content)
    refused([*FIT, f"--data.init_args.training_shards={tmp_path / 'shards'}"], "index.json")


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this size, with the right checksum."""
    whole = encoded(draw(0, (8, 8)), "PNG")
    about = whole[12:16] + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + about + struct.pack(">I", zlib.crc32(about)) + whole[33:]


JPEG, PNG = jpeg(draw(1, (90, 70))), encoded(draw(2, (90, 70)), "PNG")
IMAGES: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "zeros": bytes(5000),
    "a text": b"This is no picture.",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "PostScript, which starts a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "a JPEG's first bytes": JPEG[:20],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "a JPEG without its first bytes": JPEG[4:],
    "a JPEG's header with noise": JPEG[:600] + bytes(range(256)) * 8,
    "a PNG's first bytes": PNG[:8],
    "half a PNG": PNG[: len(PNG) // 2],
    "a PNG with a wrong checksum": PNG[:29] + b"\0\0\0\0" + PNG[33:],
    "a PNG of no width": png_of(0, 8),
    "a PNG that would fill the memory": png_of(60_000, 60_000),
    "a PNG that is a line": png_of(2**31 - 1, 1),
    "half a GIF": encoded(draw(3, (90, 70)), "GIF")[:300],
    "half a WebP": encoded(draw(3, (90, 70)), "WEBP")[:200],
    "a pickle": pickle.dumps(Evil()),
}


@pytest.mark.parametrize("content", cases(IMAGES))
def test_images(
    content: bytes, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    """One that cannot be read is named and left out where that is allowed; where there is no other, nothing is left."""
    (tmp_path / "pictures" / "dog").mkdir(parents=True)
    (tmp_path / "pictures" / "dog" / "bad.png").write_bytes(content)
    encode = [*ENCODE, f"--root={tmp_path / 'pictures'}", f"--output={tmp_path / 'encoded'}"]
    refused([*encode, "--max_unreadable=1"], "not one picture")
    (tmp_path / "pictures" / "dog" / "good.png").write_bytes(PNG)
    encode[-1] += "_too"
    refused([*encode, "--max_unreadable=0"], "dog/bad.png")
    assert main([*encode, "--max_unreadable=1"]) == 0
    assert "dog/bad.png" in capsys.readouterr().err
    assert json.loads((tmp_path / "encoded_too" / "index.json").read_text())["num_samples"] == 1
    assert not (home / "ran").exists()


def folder_without_classes(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(JPEG)


def folder_with_an_empty_class(folder: Path) -> None:
    (folder / "cat").mkdir()
    (folder / "dog").mkdir()
    (folder / "dog" / "a.jpg").write_bytes(JPEG)


def folder_with_a_dangling_link(folder: Path) -> None:
    (folder / "dog").mkdir()
    (folder / "dog" / "a.jpg").symlink_to("nowhere.jpg")


def folder_in_a_circle(folder: Path) -> None:
    folder_with_an_empty_class(folder)
    (folder / "dog" / "again").symlink_to(folder)


def tar_with(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda folder: write_tar(folder / "a.tar", members)


def file_of(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


PICTURES_TAR = tar_of(("a.jpg", JPEG), ("a.cls", b"0"))
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, "no pictures"),
    "of texts": (file_of("a.txt", b"dog"), "no pictures"),
    "without classes": (folder_without_classes, "no class folder"),
    "with an empty class": (folder_with_an_empty_class, "cat"),
    "with a link to nothing": (folder_with_a_dangling_link, "not one picture"),
    "that holds itself": (folder_in_a_circle, "again is a link to a folder that it lies in"),
    "of an empty tar": (file_of("a.tar", b""), "cut short"),
    "of a tar cut in its first header": (file_of("a.tar", PICTURES_TAR[:100]), "cut short"),
    "of a tar cut in its first picture": (file_of("a.tar", PICTURES_TAR[:1024]), "cut short"),
    "of a tar cut at its end": (file_of("a.tar", PICTURES_TAR[:-10240]), "cut short"),
    "of a tar with a hole": (file_of("a.tar", PICTURES_TAR[:6144] + bytes(2048) + PICTURES_TAR[8192:]), "cut short"),
    "of a compressed tar": (file_of("a.tar", gzip.compress(PICTURES_TAR)), "cut short"),
    "of a tar of texts": (tar_with(("a.txt", b"dog"), ("b.txt", b"cat")), "not one picture"),
    "of a tar without labels": (tar_with(("a.jpg", JPEG)), "no label"),
    "of a tar with labels alone": (tar_with(("a.cls", b"0")), "not one picture"),
    "of a tar with an empty label": (tar_with(("a.jpg", JPEG), ("a.cls", b"")), "a.cls"),
    "of a tar with a label that is a word": (tar_with(("a.jpg", JPEG), ("a.cls", b"dog")), "a.cls"),
    "of a tar with a label below 0": (tar_with(("a.jpg", JPEG), ("a.cls", b"-1")), "-1"),
    "of a tar with an enormous label": (tar_with(("a.jpg", JPEG), ("a.cls", b"9" * 30)), "9999"),
    "of a tar with a label of endless digits": (tar_with(("a.jpg", JPEG), ("a.cls", b"9" * 10_000)), "a.cls"),
    "of a tar with a label by name": (tar_with(("a.jpg", JPEG), ("a.json", b'{"label": "dog"}')), "--classes_from"),
    "of a tar with a label that is half": (tar_with(("a.jpg", JPEG), ("a.json", b'{"label": 0.5}')), "0.5"),
    "of a tar with a label that is a list": (tar_with(("a.jpg", JPEG), ("a.json", b'{"label": [0]}')), "[0]"),
    "of a tar with JSON that is cut": (tar_with(("a.jpg", JPEG), ("a.json", b'{"label": ')), "a.json"),
    "of a tar with JSON nested without end": (tar_with(("a.jpg", JPEG), ("a.json", b"[" * 100_000)), "a.json"),
    "of a tar with labels not in utf-8": (tar_with(("a.jpg", JPEG), ("a.json", b'{"label": "\xff"}')), "a.json"),
    "of a tar with broken pictures alone": (tar_with(("a.jpg", JPEG[:99]), ("a.cls", b"0")), "not one picture"),
    "of a tar that climbs out, with broken pictures": (
        tar_with(("../../evil.jpg", b"x"), ("../../evil.cls", b"0"), ("/tmp/evil.jpg", b"x"), ("/tmp/evil.cls", b"0")),
        "not one picture",
    ),
}


@pytest.mark.parametrize("case", cases(FOLDERS))
def test_folders_of_pictures(case: tuple[Callable[[Path], object], str], tmp_path: Path, refused: Refused) -> None:
    make, telling = case
    (tmp_path / "root").mkdir()
    make(tmp_path / "root")
    encode = [*ENCODE, f"--root={tmp_path / 'root'}", f"--output={tmp_path / 'encoded'}", "--max_unreadable=1"]
    refused(encode, telling)
    assert not (tmp_path / "encoded" / "index.json").exists()
    assert not [path for path in tmp_path.parent.rglob("evil*") if path.parent != tmp_path / "root"]


NO_SETTINGS = {"null": b"null", "a number": b"3", "nested without end": b"[" * 100_000}


@pytest.mark.parametrize("content", cases(NO_SETTINGS))
def test_folders_that_encoding_cannot_go_on_in(content: bytes, home: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(home / "pixels", tmp_path / "pixels")
    (tmp_path / "pixels" / "encode.json").write_bytes(content)
    refused([*ENCODE, "--root=pictures", f"--output={tmp_path / 'pixels'}"], "encode.json")


NO_SHARD = NO_SETTINGS | {
    "words for counts": b'{"num_samples": "x", "highest_label": "x"}',
    "a number for names": b'{"num_samples": 3, "highest_label": 1, "unreadable": 3}',
}


@pytest.mark.parametrize("content", cases(NO_SHARD))
def test_a_shard_that_nothing_is_known_of_is_made_anew(
    content: bytes, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    shutil.copytree(home / "pixels", tmp_path / "pixels")
    (tmp_path / "pixels" / "00000.json").write_bytes(content)
    assert main([*ENCODE, "--root=pictures", f"--output={tmp_path / 'pixels'}"]) == 0
    for path in (home / "pixels").iterdir():
        assert (tmp_path / "pixels" / path.name).read_bytes() == path.read_bytes()


class Unsendable(BatchDataset):
    """Its batches cannot be handed on, as those of any data set cannot where shared memory is full."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, indices: torch.Tensor) -> Any:
        return lambda: indices


def test_a_batch_that_cannot_be_handed_on_is_not_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    with at_most(3 * SECONDS), pytest.raises(RuntimeError) as caught:
        list(Loader(Unsendable(), [torch.arange(1)], 1))
    assert end_of_loader(caught.value) is not None
    assert "cannot hand on a batch" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("length", "status"), [(71, 0), (72, 2)])
def test_a_temporary_folder_whose_path_is_too_long_for_sockets(length: int, status: int) -> None:
    """Loader processes hand tensors on by sockets there; Python says no more than that a path is too long."""
    command = ["bench", "data", "--num-images=8", "--num-videos=0", "--num-jpegs=0", "--batch-size=4", "--repeats=1"]
    with TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short) / ("x" * (length - len(short) - 1))
        folder.mkdir()
        ended = subprocess.run(
            [sys.executable, "-m", "elt_lightning", *command, "--num-workers=1"],
            env=os.environ | {"TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode == status, ended.stderr
    assert (f"{folder}, has too long a path" in ended.stderr) == bool(status)


def test_members_that_climb_out_of_a_tar_are_never_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such names are names and nothing more: the pictures are read, and no file is made of them."""
    names = ("../../climbed", f"{tmp_path}/climbed", "a/../../climbed")
    members = [(f"{name}.{ending}", JPEG if ending == "jpg" else b"0") for name in names for ending in ("jpg", "cls")]
    write_tar(tmp_path / "in" / "a.tar", members)
    monkeypatch.chdir(home)
    assert main([*ENCODE, f"--root={tmp_path / 'in'}", f"--output={tmp_path / 'deep' / 'er' / 'out'}"]) == 0
    assert not list(tmp_path.parent.rglob("climbed*"))


def trained(home: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(home / "trained" / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def changed(home: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    content = copy.deepcopy(trained(home))
    change(content)
    return saved(content)


def drop_a_weight(content: dict[str, Any]) -> None:
    name = next(name for name in content["state_dict"] if "backbone" in name)
    del content["state_dict"][name], content["ema"]["weights"][name]


def part(first: float, last: float) -> Callable[[Path], bytes]:
    """A part of the trained checkpoint's bytes."""

    def cut(home: Path) -> bytes:
        content = (home / "trained" / "checkpoints" / "last.ckpt").read_bytes()
        return content[int(first * len(content)) : int(last * len(content))]

    return cut


WEIGHT = "network.embedding.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda home: b"", "not a readable checkpoint"),
    "one byte": (lambda home: b"\x80", "not a readable checkpoint"),
    "zeros": (lambda home: bytes(4096), "not a readable checkpoint"),
    "a text": (lambda home: b"a checkpoint", "not a readable checkpoint"),
    "a zip of nothing": (lambda home: zipped(), "not a readable checkpoint"),
    "a zip of a text": (lambda home: zipped(text=b"a"), "not a readable checkpoint"),
    "a quarter": (part(0, 0.25), "not a readable checkpoint"),
    "half": (part(0, 0.5), "not a readable checkpoint"),
    "all but the last bytes": (part(0, 0.9999), "not a readable checkpoint"),
    "without the first bytes": (part(0.01, 1), "not a readable checkpoint"),
    "a pickle that runs a command": (lambda home: pickle.dumps(Evil()), "not a readable checkpoint"),
    "a checkpoint that runs a command": (lambda home: saved(Evil()), "not a readable checkpoint"),
    "one that runs a command, deep in it": (
        lambda home: changed(home, lambda content: content["elt"].update(model=Evil())),
        "not a readable checkpoint",
    ),
    "a whole module": (lambda home: saved(torch.nn.Linear(2, 2)), "not a readable checkpoint"),
    "a tensor": (lambda home: saved(torch.zeros(3)), "not written by"),
    "a list": (lambda home: saved([1, 2]), "not written by"),
    "weights alone": (lambda home: saved(trained(home)["state_dict"]), "not written by"),
    "another program's": (lambda home: changed(home, lambda content: content.pop("elt")), "not written by"),
    "without weights": (lambda home: changed(home, lambda content: content.pop("state_dict")), "not written by"),
    "with a list for weights": (
        lambda home: changed(home, lambda content: content.update(state_dict=[])),
        "state_dict",
    ),
    "with words for weights": (
        lambda home: changed(
            home, lambda content: content["state_dict"].update(dict.fromkeys(content["state_dict"], "x"))
        ),
        "state_dict",
    ),
    "with sparse weights": (
        lambda home: changed(
            home,
            lambda content: content.update(state_dict={n: w.to_sparse() for n, w in content["state_dict"].items()}),
        ),
        "state_dict",
    ),
    "without a step": (lambda home: changed(home, lambda content: content.pop("global_step")), "global_step"),
    "of a step below 0": (lambda home: changed(home, lambda content: content.update(global_step=-1)), "global_step"),
    "with averaged weights that are no numbers": (
        lambda home: changed(home, lambda content: content["ema"]["weights"][WEIGHT].fill_(torch.nan)),
        "weights are damaged: 1 not finite such as network.",
    ),
    "with averaged weights that are whole numbers": (
        lambda home: changed(
            home,
            lambda content: content["ema"].update(
                weights={n: w.to(torch.int8) for n, w in content["ema"]["weights"].items()}
            ),
        ),
        "of another type such as network.",
    ),
    "of an older version": (lambda home: changed(home, lambda content: content["elt"].update(version=1)), "older"),
    "of version 0": (lambda home: changed(home, lambda content: content["elt"].update(version=0)), "versions from 1"),
    "of a version below 0": (
        lambda home: changed(home, lambda content: content["elt"].update(version=-1)),
        "versions from 1",
    ),
    "of a step that is a word": (
        lambda home: changed(home, lambda content: content.update(global_step="x")),
        "global_step",
    ),
    "with nothing for an average": (lambda home: changed(home, lambda content: content.update(ema=None)), "ema"),
    "with words for an average": (
        lambda home: changed(home, lambda content: content["ema"].update(weights="x")),
        "ema",
    ),
    "with data that are a list": (lambda home: changed(home, lambda content: content["elt"].update(data=[])), "build"),
    "a newer version's": (lambda home: changed(home, lambda content: content["elt"].update(version=99)), "newer"),
    "of a version that is a word": (
        lambda home: changed(home, lambda content: content["elt"].update(version="two")),
        "version",
    ),
    "with a list for a recipe": (lambda home: changed(home, lambda content: content.update(elt=[])), "build"),
    "without a model": (lambda home: changed(home, lambda content: content["elt"].pop("model")), "build"),
    "without an average": (lambda home: changed(home, lambda content: content.pop("ema")), "--weights raw"),
    "without one of its weights": (lambda home: changed(home, drop_a_weight), "network.backbone"),
    "of a class that is not there": (
        lambda home: changed(home, lambda content: content["elt"]["model"]["network"].update(class_path="no.Network")),
        "no.Network",
    ),
    "of a class whose name is an order to the terminal": (
        lambda home: changed(
            home, lambda content: content["elt"]["model"]["network"].update(class_path="no.\x1b[2JN" + 5000 * "o")
        ),
        "\\x1b[2JN",
    ),
    "of a class that is a command": (
        lambda home: changed(home, lambda content: content["elt"]["model"]["network"].update(class_path="os.system")),
        "os.system",
    ),
    "of another width": (
        lambda home: changed(home, lambda content: content["elt"]["model"]["network"]["init_args"].update(width=32)),
        "shape",
    ),
    "of a tokenizer that is not there": (
        lambda home: changed(home, lambda content: content["elt"]["tokenizer"].update(class_path="no.Tokenizer")),
        "no.Tokenizer",
    ),
    "of a tokenizer that is none": (
        lambda home: changed(home, lambda content: content["elt"]["tokenizer"].update(class_path="os.system")),
        "os.system",
    ),
    "of a tokenizer that says nothing": (
        lambda home: changed(home, lambda content: content["elt"].update(tokenizer={})),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("case", cases(CHECKPOINTS))
def test_checkpoints(case: tuple[Callable[[Path], bytes], str], home: Path, tmp_path: Path, refused: Refused) -> None:
    make, telling = case
    (home / "bad.ckpt").write_bytes(make(home))
    refused(["sample", "--ckpt_path=bad.ckpt", "--num=1", f"--output={tmp_path / 'grid.png'}"], telling)
    assert not list(tmp_path.iterdir())
    assert not (home / "ran").exists()


RESUMED = (
    "a quarter",
    "half",
    "a pickle that runs a command",
    "a newer version's",
    "weights alone",
    "of another width",
)


def with_change(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], bytes]:
    return lambda home: changed(home, change)


STATES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    f"{how} {name}": (with_change(change), name)
    for name in ("optimizer_states", "lr_schedulers", "loops", "callbacks", "pytorch-lightning_version")
    for how, change in {
        "without": lambda content, name=name: content.pop(name),
        "with a number for": lambda content, name=name: content.update({name: 3}),
    }.items()
}


def with_moments(**changes: Any) -> Callable[[Path], bytes]:
    """A checkpoint with other entries in the optimiser's state of its first weight; None for one that is left out."""

    def change(content: dict[str, Any]) -> None:
        state = content["optimizer_states"][0]["state"]
        state[0] = {name: value for name, value in (state[0] | changes).items() if value is not None}

    return with_change(change)


def emptied(name: str) -> Callable[[Path], bytes]:
    return with_change(lambda content: content[name].clear())


STATES |= {
    "with moments of another shape": (
        with_moments(exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3)),
        "exp_avg of weight 0 has shape (3,), not (",
    ),
    "with moments that are whole numbers": (
        with_change(
            lambda content: [
                state.update(exp_avg=state["exp_avg"].long())
                for state in content["optimizer_states"][0]["state"].values()
            ]
        ),
        "exp_avg of weight 0 is of torch.int64",
    ),
    "with moments that are no numbers": (
        with_change(lambda content: content["optimizer_states"][0]["state"][1]["exp_avg_sq"].fill_(torch.nan)),
        "exp_avg_sq of weight 1 is not finite",
    ),
    "with a word for moments": (with_moments(exp_avg="much"), "exp_avg of weight 0 is a str, not a Tensor"),
    "with a moment too few": (with_moments(exp_avg=None), "exp_avg_sq, step of a weight"),
    "with an optimiser's step below 0": (with_moments(step=torch.tensor(-3.0)), "step of weight 0 is below 0"),
    "with moments under other numbers": (
        with_change(
            lambda content: content["optimizer_states"][0].update(
                state={f"w{number}": state for number, state in content["optimizer_states"][0]["state"].items()}
            )
        ),
        "optimiser is of other weights, or is damaged",
    ),
    "with weights too few in the optimiser": (
        with_change(lambda content: content["optimizer_states"][0]["param_groups"][0]["params"].pop()),
        "optimiser is of other weights, or is damaged",
    ),
    "without any optimiser": (emptied("optimizer_states"), "optimizer_states"),
    "without any schedule": (emptied("lr_schedulers"), "lr_schedulers"),
    "with a schedule below 0": (
        with_change(lambda content: content["lr_schedulers"][0].update(last_epoch=-2)),
        "lr_schedulers",
    ),
    "with broken weights": (with_change(lambda content: content["state_dict"][WEIGHT].fill_(torch.inf)), "not finite"),
    "with a broken average": (
        with_change(lambda content: content["ema"]["weights"][WEIGHT].fill_(torch.nan)),
        "average is of another network, or is damaged: 1 not finite",
    ),
    "with an average of another shape": (
        with_change(lambda content: content["ema"]["weights"].update({WEIGHT: torch.zeros(3)})),
        f"average is of another network, or is damaged: 1 of another shape such as {WEIGHT}",
    ),
    "with half an average": (with_change(lambda content: content["ema"]["weights"].pop(WEIGHT)), "average"),
    "with nothing known of its data": (with_change(lambda content: content.update(ImageNetDataModule={})), "tokenizer"),
    "with data of a class that is not there": (
        with_change(lambda content: content["elt"]["data"].update(class_path="no.Data")),
        "there is no class",
    ),
    "with a network of a class that is not there": (
        with_change(lambda content: content["elt"]["model"]["network"].update(class_path="no.Network")),
        "there is no class",
    ),
    "with a model that is a word": (
        with_change(lambda content: content["elt"]["model"].update(network="x")),
        "network",
    ),
}


@pytest.mark.parametrize("case", cases({name: CHECKPOINTS[name] for name in RESUMED} | STATES))
def test_checkpoints_to_go_on_from(case: tuple[Callable[[Path], bytes], str], home: Path, refused: Refused) -> None:
    make, telling = case
    (home / "bad.ckpt").write_bytes(make(home))
    refused(["fit", "--ckpt_path=bad.ckpt", "--run_dir=new", "--trainer.max_steps=3"], telling)
    assert not (home / "ran").exists()


@pytest.mark.parametrize("arguments", [["sample"], ["test", "--num_samples=4"], ["predict", "--num_samples=4"]])
def test_predictions_that_are_not_finite(arguments: list[str], home: Path, tmp_path: Path, refused: Refused) -> None:
    """Finite weights can overflow: neither a black picture nor scores of it are made."""

    def overflow(content: dict[str, Any]) -> None:
        for weights in (content["state_dict"], content["ema"]["weights"]):
            for name, weight in weights.items():
                if "layers" in name:
                    weight.mul_(1e30).add_(1e30)

    (home / "bad.ckpt").write_bytes(changed(home, overflow))
    if arguments[0] == "sample":
        arguments = [*arguments, "--num=1", f"--output={tmp_path / 'grid.png'}"]
    refused([*arguments, "--ckpt_path=bad.ckpt"], "the model's predictions are not finite")
    assert not list(tmp_path.iterdir())


def edited(**values: object) -> Callable[[Path], None]:
    """An export whose config.json has other values."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | values))

    return edit


def reweighted(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """An export with other weights."""

    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({name: change(weight) for name, weight in load_file(path).items()}, path)

    return write


EXPORTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "without a config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "without weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "with an empty config": (file_of("config.json", b""), "damaged"),
    "with a config that is a list": (file_of("config.json", b"[]"), "config.json"),
    "with a config of another program": (file_of("config.json", b'{"model_type": "bert"}'), "config.json"),
    "with a config nested without end": (file_of("config.json", b"[" * 100_000), "damaged"),
    "with empty weights": (file_of("model.safetensors", b""), "damaged"),
    "with weights that are a text": (file_of("model.safetensors", b"weights" * 99), "damaged"),
    "with a pickle for weights": (file_of("model.safetensors", pickle.dumps(Evil())), "damaged"),
    "with half its weights": (
        lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2),
        "damaged",
    ),
    "with other weights": (lambda folder: save_file({"a": torch.ones(2)}, folder / "model.safetensors"), "weights"),
    "with weights that are whole numbers": (
        reweighted(lambda weight: weight.to(torch.int64)),
        "of another type such as",
    ),
    "with weights that are infinite": (reweighted(lambda weight: weight / 0), "not finite such as"),
    "of a newer version": (edited(version=99), "newer"),
    "of a version that is a word": (edited(version="two"), "version"),
    "of unknown weights": (edited(weights="best"), "weights"),
    "of a model that is a list": (edited(model=[]), "build"),
    "of a model that is a command": (edited(model={"network": {"class_path": "os.system"}}), "built"),
    "of a tokenizer that is a list": (edited(tokenizer=[]), "build"),
}


@pytest.mark.parametrize("case", cases(EXPORTS))
def test_exported_models(
    case: tuple[Callable[[Path], object], str], home: Path, tmp_path: Path, refused: Refused
) -> None:
    spoil, telling = case
    shutil.copytree(home / "exported", tmp_path / "export")
    spoil(tmp_path / "export")
    grid = tmp_path / "grid.png"
    refused(["sample", f"--ckpt_path={tmp_path / 'export'}", "--num=1", f"--output={grid}"], telling)
    assert not grid.exists()
    assert not (home / "ran").exists()


def test_the_untouched_inputs_are_fine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all of the above spoil one thing of."""
    monkeypatch.chdir(home)
    assert main([*SAMPLE[:-1], "--output=good.png"]) == 0
    assert main(["sample", "--ckpt_path=exported", "--num=1", "--output=exported.png"]) == 0
    assert (home / "good.png").read_bytes() == (home / "exported.png").read_bytes()
    (home / "whole").mkdir()
    shutil.copytree(home / "tokens", home / "whole" / "shards")
    (home / "whole" / "shards" / "00000.tar").write_bytes(GOOD)
    assert main([*FIT, "--data.init_args.training_shards=whole/shards", "--run_dir=whole/run"]) == 0


WHOLE_PROGRAM: dict[str, tuple[list[str], str]] = {
    "no such command": (["fitt"], "did you mean fit"),
    "a shard that a loader process finds cut": (
        [*FIT, "--data.init_args.training_shards=cut", "--data.init_args.num_workers=1", "--run_dir=cut/run"],
        "00000.tar",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * ("shard" in name))
        for name, case in WHOLE_PROGRAM.items()
    ],
)
def test_the_program_itself(arguments: list[str], telling: str, home: Path) -> None:
    if not (home / "cut").exists():
        shutil.copytree(home / "tokens", home / "cut")
        os.truncate(home / "cut" / "00000.tar", 5000)
    before = fingerprints(home)
    command = [sys.executable, "-m", "elt_lightning", *arguments]
    strange = os.environ | {"MPLBACKEND": "junk", "PYTHONIOENCODING": "ascii"}  # neither is in the way
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=strange, timeout=6 * SECONDS)
    check(done.returncode, done.stderr, telling)
    after = fingerprints(home)
    assert {path: after.get(path) for path in before} == before
    assert not (home / "ran").exists()

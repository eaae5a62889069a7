import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.bench.data_files import write_pictures, write_videos
from elt_lightning.bench.data_need import (
    diffusion_need,
    flops_per_training_image,
    masked_need,
    tokenizer_need,
    video_need,
)
from elt_lightning.bench.memory import peak_above_start
from elt_lightning.bench.report import figures
from elt_lightning.bench.runs import add_run, read_runs
from elt_lightning.bench.shapes import SHAPES, twin
from elt_lightning.bench.timing import SideBySide
from elt_lightning.cli import main
from elt_lightning.commands.plan import read
from elt_lightning.commands.planning import optimizer_bytes_per_byte, rehearse
from elt_lightning.data.decoding import num_frames, read_clip
from elt_lightning.data.ucf101 import list_videos
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.reproduce.published import TABLE_3, TABLE_8
from elt_lightning.tokenizers.vq_training import VQTraining
from elt_lightning.training.module import ELTModule
from elt_lightning.training.precision import PRECISIONS, Types

ROOT = Path(__file__).parent.parent
QUICK = ["--turn_seconds=0.001", "--device=cpu"]


def test_reading_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "benchmarks" / "data.json"
    counts = ["--num-images=40", "--num-videos=4", "--num-jpegs=4", "--batch-size=4"]
    assert main(["bench", "data", *counts, "--num-workers=0", "--repeats=2", f"--output={output}"]) == 0
    content = json.loads(output.read_text())
    assert content["torch"]
    assert {reading["codes"]: reading["unit"] for reading in content["readings"]} == {
        "tokens": "images",
        "moments of latents": "images",
        "tokens of clips": "clips",
        "clips of AVI files": "clips",
        "JPEG files, to be encoded": "images",
    }
    for reading in content["readings"]:
        speeds = reading[f"{reading['unit']}_per_second"]
        assert len(speeds) == 2
        assert reading["median"] == median(speeds) > 0
        assert reading["batches_per_second"] == pytest.approx(reading["median"] / 4)
        assert reading["hours"] == pytest.approx(reading["published"] / reading["median"] / 3600)
    *trained_on, encoded = content["readings"]
    for reading in trained_on:
        assert reading["ratio"] == pytest.approx(reading["median"] / reading["needed_per_second"])
    assert encoded["needed_per_second"] is encoded["ratio"] is None
    assert "GPUs fed" in capsys.readouterr().out


def test_what_is_not_asked_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for module in ("data", "data_files"):
        there = partial(TemporaryDirectory, dir=scratch)
        monkeypatch.setattr(f"elt_lightning.bench.{module}.TemporaryDirectory", there)
    output = tmp_path / "data.json"
    flags = ["--num-images=0", "--num-videos=0", "--num-jpegs=70", "--num-workers=2", "--repeats=1"]
    assert main(["bench", "data", *flags, f"--output={output}"]) == 0
    (reading,) = json.loads(output.read_text())["readings"]
    assert (reading["codes"], reading["batch_size"]) == ("JPEG files, to be encoded", 64)
    assert not list(scratch.iterdir())


def test_files_that_are_made_are_as_large_as_the_published_ones(tmp_path: Path) -> None:
    write_videos(tmp_path, 4)
    videos = list_videos(tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist", "all", val=False)
    assert len(videos) == 4
    for video in videos:
        assert num_frames(video.path) == 188
        assert Path(video.path).stat().st_size == pytest.approx(6.5e9 / 13_320, rel=0.1)
    assert read_clip(videos[0].path, 187, 1).shape == (1, 240, 320, 3)
    write_pictures(tmp_path / "pictures", 4)
    sizes = [path.stat().st_size for path in (tmp_path / "pictures").rglob("*.JPEG")]
    assert len(sizes) == 4
    assert median(sizes) == pytest.approx(138e9 / 1_281_167, rel=0.1)


def test_what_a_gpu_needs_follows_from_the_networks_size() -> None:
    # 24 layers of 12·1024² weights at 257 tokens, or 1025, or 32 of 12·2048² at 256, and attention's two products.
    masked, video = (24 * tokens * (12 * 1024**2 + 2 * tokens * 1024) for tokens in (257, 1025))
    assert 0.5 * 989e12 / masked_need() == pytest.approx(flops_per_training_image(masked), rel=0.02)
    assert 0.5 * 989e12 / video_need() == pytest.approx(flops_per_training_image(video), rel=0.02)
    diffusion = 32 * 256 * (12 * 2048**2 + 2 * 256 * 2048)
    assert 0.5 * 989e12 / diffusion_need() == pytest.approx(flops_per_training_image(diffusion), rel=0.05)


def test_what_the_tokenizers_training_needs_is_what_a_step_of_it_computes() -> None:
    config = yaml.safe_load((ROOT / "configs" / "ucf101" / "tokenizer.yaml").read_text())["model"]["init_args"]
    # The penalty is left out: torch counts no gradients of gradients.
    settings = {name: config[name] for name in ("sample_shape", "filters")} | {"r1_weight": 0.0}
    with torch.device("meta"):
        training = VQTraining(**settings)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        training.to_empty(device="cpu")
        clip = torch.zeros(1, 3, *training.sample_shape)
        reconstruction, quantized = training.network(clip)
        losses = training.autoencoder_losses(clip, reconstruction, quantized)
        assert training.discriminator is not None
        losses |= training.adversarial_losses(training.discriminator, clip, reconstruction)
        torch.stack(list(losses.values())).sum().backward()
    assert 0.5 * 989e12 / tokenizer_need() == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_a_wrong_kind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_sampling_is_measured_beside_the_unlooped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "inference.json"
    flags = [*QUICK, "--scale=tiny,tiny_dit", "--batch-sizes=3", "--guidance=2", "--rounds=2", f"--output={path}"]
    assert main(["bench", "inference", *flags]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["torch"] == torch.__version__
    assert run["command"].startswith("elt bench inference ")
    rows = run["rows"]
    assert len(rows) == 2 * 2 * 2  # sizes, models, loop counts
    for row in rows:
        assert len(row["sample_seconds"]) == len(row["pass_seconds"]) == 2
        assert min(row["sample_seconds"]) > 0
        assert row["samples_per_second"] == pytest.approx(row["batch_size"] / median(row["sample_seconds"]))
        assert 0 < row["pass_share_of_peak"] < 1
        shape = SHAPES[row["shape"]]
        with torch.device("meta"):
            layers = shape.num_layers * (row["loops"] if row["model"] == "unlooped" else 1)
            network = shape.build(layers, torch.float32, torch.device("meta"))
        assert row["parameters"] == sum(weight.numel() for weight in network.parameters())
        assert row["peak_memory_bytes"] > 4 * row["parameters"]
    assert main(["bench", "report", f"--folder={tmp_path}"]) == 0
    page = (tmp_path / "figures.md").read_text()
    assert page.count("| tiny_dit | 1×2 |") == 1
    assert "samples per second" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_measured_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    flags = [*QUICK, "--scale=tiny", "--loops=1,3", "--batch-sizes=2", "--rounds=2"]
    flags += ["--activation-checkpointing=no,yes", "--recall"]
    for precision in ("32-true", "bf16-mixed"):
        assert main(["bench", "train", *flags, f"--precision={precision}", f"--output={path}"]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [row["precision"] for run in runs for row in run["rows"][:1]] == ["32-true", "bf16-mixed"]
    rows = {(row["loops"], row["way"], row["activation_checkpointing"]): row for row in runs[0]["rows"]}
    assert rows.keys() == {
        *((1, way, False) for way in ("vanilla", "unlooped")),
        (1, "vanilla", True),
        *((3, way, again) for way in ("ilsd", "recall", "vanilla") for again in (False, True)),
        (3, "unlooped", False),
    }
    for row in rows.values():
        assert len(row["step_seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(2 / median(row["step_seconds"]))
        assert 0 < row["share_of_peak"] < 1
    looped, unlooped = rows[3, "vanilla", False], rows[3, "unlooped", False]
    assert rows[3, "recall", False]["parameters"] - looped["parameters"] == 1  # β of a post-norm stack
    # Weights, gradients and AdamW's two moments; its counters of steps are a few bytes for each tensor.
    saving = 16 * (unlooped["parameters"] - looped["parameters"])
    assert unlooped["peak_memory_bytes"] - looped["peak_memory_bytes"] == pytest.approx(saving, rel=0.02)
    assert rows[3, "vanilla", True]["peak_memory_bytes"] < looped["peak_memory_bytes"]
    assert rows[3, "ilsd", False]["peak_memory_bytes"] > looped["peak_memory_bytes"]


def test_a_run_takes_the_place_of_an_earlier_one_by_the_same_command(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "training.json"
    for command, speed in (("one --output a.json", 1), ("two", 2), ("one", 3)):
        add_run(path, {"device": "a CPU", "device_type": "cpu", "command": command, "rows": [{"speed": speed}]})
    assert [(run["command"], run["rows"][0]["speed"]) for run in read_runs(path)] == [("two", 2), ("one", 3)]


def module_of(name: str, **changes: Any) -> ELTModule:
    module = read(["--config", str(ROOT / "configs" / "imagenet256" / f"{name}.yaml")])[2]
    for setting, value in changes.items():
        setattr(module, setting, value)
    return module


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the end of a training step's forward pass.

    Copies of weights in autocast's type are counted, averaged weights and the buffers of several devices are not.

    Attributes:
        resident: what is there whatever the batch: weights, gradients and casts, the optimiser's state.
        per_sample: what is kept of each sample for the backward pass.
    """

    resident: int
    per_sample: int

    @classmethod
    def of(cls, module: ELTModule, precision: Types) -> "TrainingMemory":
        """Count the bytes of a model, best on the ``meta`` device, in a precision."""
        weights = sum(weight.numel() for weight in module.network.parameters()) * precision.weights.itemsize
        state = round(weights * optimizer_bytes_per_byte(module, precision.weights))
        kept = rehearse(module, precision)
        return cls(2 * weights + state + kept.copies, kept.per_sample)

    def at(self, batch_size: int) -> int:
        """Bytes of a pass of that many samples."""
        return self.resident + batch_size * self.per_sample


def batch_of_saving(looped: TrainingMemory, unlooped: TrainingMemory, share: float) -> float:
    """Find the batch at which the looped model takes ``share`` less memory than the unlooped one; smaller save more.

    Both grow with the batch nearly alike, and what is saved is what the missing parameters take. A negative number says
    that so much is never saved.
    """
    # (1 − share)·(unlooped + batch·its activations) = looped + batch·its activations
    resident = (1 - share) * unlooped.resident - looped.resident
    return resident / (looped.per_sample - (1 - share) * unlooped.per_sample)


@pytest.mark.slow
def test_what_looping_saves_is_what_the_missing_parameters_take() -> None:
    """At the paper's size: weights, gradients, two moments; the student's head is ILSD's, and left out here."""
    looped, unlooped = (
        TrainingMemory.of(module, PRECISIONS["32-true"])
        for module in (module_of("elt_l_8n3l", distillation=ILSD(3, mode="vanilla")), module_of("maskgit_l"))
    )
    missing = 16 * (12 * 1024**2 + 13 * 1024)  # layers of scale L
    for batch_size in (1, 32, 512):
        assert unlooped.at(batch_size) - looped.at(batch_size) == missing * (4 + 4 + 8)


@pytest.mark.slow
def test_the_papers_saving_is_met_at_a_batch() -> None:
    precision = PRECISIONS["bf16-mixed"]
    looped, unlooped = (TrainingMemory.of(module_of(name), precision) for name in (TABLE_8.model, TABLE_8.baseline))
    batch = int(batch_of_saving(looped, unlooped, 0.34))
    assert batch == 47
    assert 1 - looped.at(batch + 1) / unlooped.at(batch + 1) < 0.34 <= 1 - looped.at(batch) / unlooped.at(batch)


def test_peak_memory_is_that_of_what_lives_at_once() -> None:
    million = 1000 * 1000

    def work() -> None:
        first = torch.zeros(million)  # 4 MB
        second = first.double()  # and 8 MB
        del first
        third = second + 1  # 16 MB without the first
        del second, third
        torch.zeros(million)

    peak = peak_above_start(work, torch.device("cpu"))
    assert 16 * million <= peak < 16.1 * million


def test_the_committed_page_of_figures_is_made_of_the_committed_files() -> None:
    assert figures(ROOT / "benchmarks") == (ROOT / "benchmarks" / "figures.md").read_text()


def test_wrong_places_are_named_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("inference", "train", "data"):
        assert main(["bench", kind, "--output", str(tmp_path)]) == 2
        assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert main(["bench", "report", "--folder", str(tmp_path / "none")]) == 2
    assert "holds none of inference.json, training.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_turns_alternate_and_every_round_has_each_contender_once() -> None:
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = SideBySide(torch.device("cpu"), rounds=3, shortest=1e-9).time(contenders)
    assert "".join(order) == "abc" + "abc" + "abc" + "cba" + "abc"  # the first two warm up
    assert {name: len(measured.seconds) for name, measured in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_twins_share_their_weights() -> None:
    network = SHAPES["tiny"].build(1, torch.float32, torch.device("cpu"))
    other = twin(network)
    other.backbone.activation_checkpointing = True
    assert not network.backbone.activation_checkpointing
    assert all(a is b for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_sizes_are_those_of_the_tables() -> None:
    for row in TABLE_3:
        assert (SHAPES[row.scale].num_layers, SHAPES[row.scale].loops) == (row.num_layers, row.loops)
    wide = SHAPES["wide"]
    for name, layers in ((TABLE_8.model, wide.num_layers), (TABLE_8.baseline, wide.num_layers * wide.loops)):
        network = wide.build(layers, torch.float32, torch.device("meta"))
        theirs = module_of(name).network
        assert [w.shape for w in network.parameters()] == [w.shape for w in theirs.parameters()]


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (["inference", "--scale=huge"], "huge"),
        (["train", "--compile=yes"], "yes"),
        (["train", "--precision=8"], "8"),
        (["inference", "--batch_sizes=0"], "0"),
        (["train", "--device=cuda:99"], "cuda:99"),
        (["inference", "--guidance=-1", "--scale=tiny"], "guidance"),
        (["inference", "--turn_seconds=0", "--scale=tiny"], "turn_seconds"),
    ],
)
def test_wrong_benchmarks_are_named(flags: list[str], telling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert telling in error


def test_a_file_of_something_else_is_found_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"readings": []}')
    assert main(["bench", "inference", "--scale=tiny", f"--output={path}"]) == 2
    assert "not written by" in capsys.readouterr().err
    assert path.read_text() == '{"readings": []}'

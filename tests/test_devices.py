"""Training and testing on several devices: processes on the CPU that talk over gloo, started as launchers start them.

Sums over devices are sums in another order, and every step of Adam divides by the root of such sums. After six steps
weights of size 0.1 were found up to 6e-8 apart, which is their rounding; ``TOLERANCE`` leaves some room.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import elt_on_ranks
from shard_files import token_index, write_shards
from small_runs import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import main
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.toy.digits import DigitsDataModule

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parent.parent / "configs"
SCRIPTS = Path(__file__).parent.parent / "docs" / "devices.md"
SETTINGS = ["--config", str(CONFIGS / "digits.yaml"), *SMALL, "--trainer.accelerator=cpu", "--trainer.max_steps=6"]
SETTINGS += ["--trainer.val_check_interval=3", "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1"]
SETTINGS += ["--data.init_args.batch_size=32", "--data.init_args.micro_batch_size=8", "--trainer.log_every_n_steps=1"]
SETTINGS += ["--loop_metrics.num_validation_samples=5", "--loop_metrics.batch_size=2"]
ADAM = ["--trainer.gradient_clip_val=0.5"]
"""Small enough that every step is clipped."""
SGD = ["--trainer.gradient_clip_val=0", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"]
"""Unlike Adam's, its steps are as long as gradients are, so that a mean over devices is not mistaken for a sum."""
SGD.append("--model.network.init_args.recall=true")
DDP, SHARDED = "--trainer.strategy=ddp", "--trainer.strategy=model_parallel"
FOLDERS = [
    "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.save_distributed_checkpoint=true",
]
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one device."""
    folder = tmp_path_factory.mktemp("devices")
    DigitsDataModule(str(folder / "data" / "digits")).prepare_data()
    elt_on_ranks(["fit", *SETTINGS, *ADAM, "--run_dir=runs/adam"], folder, 1)
    elt_on_ranks(["fit", *SETTINGS, *SGD, "--run_dir=runs/sgd"], folder, 1)
    return folder


@pytest.fixture(scope="module")
def in_folders(home: Path) -> Path:
    """A run of two devices whose checkpoints are folders."""
    elt_on_ranks(["fit", *SETTINGS, *ADAM, *FOLDERS, "--trainer.devices=2", "--run_dir=runs/folders"], home, 2)
    return home / "runs" / "folders"


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_as_one_device(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare weights, average and the optimiser's moments."""
    assert found["global_step"] == expected["global_step"] == 6
    moments = [
        {(number, name): value for number, state in checkpoint["optimizer_states"][0]["state"].items()
         for name, value in state.items() if isinstance(value, torch.Tensor)}
        for checkpoint in (found, expected)
    ]  # fmt: skip
    pairs = [
        (found["state_dict"], expected["state_dict"]),
        (found["ema"]["weights"], expected["ema"]["weights"]),
        (moments[0], moments[1]),
    ]
    for here, there in pairs:
        assert here.keys() == there.keys()
        for name in there:
            torch.testing.assert_close(here[name], there[name], rtol=1e-4, atol=TOLERANCE, msg=str(name))


def scalars(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["ddp", "sharded"])
def test_two_devices_train_as_one_does(home: Path, optimiser: str, strategy: str) -> None:
    """Two micro-batches of each device are accumulated, four of the one."""
    run = home / "runs" / f"{optimiser}_{strategy[-4:]}"
    flags = [*(ADAM if optimiser == "adam" else SGD), strategy, "--trainer.devices=2", f"--run_dir={run}"]
    elt_on_ranks(["fit", *SETTINGS, *flags], home, 2)
    one = home / "runs" / optimiser
    assert_as_one_device(last(run), last(one))
    exits = [(home / f"exits_{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert exits[0] == exits[1]
    assert len(exits[0]) == 12
    assert len({line for line in exits[0] if line.startswith("3 ")}) == 1
    logged, expected = scalars(run), scalars(one)
    measured = [name for name in expected if name.startswith("val/")]
    assert {"val/loss@L1", "val/loss@L4", "val/recognised@L4", "val/fd_digits@L2"} <= set(measured)
    for name in measured:
        assert logged[name] == pytest.approx(expected[name], rel=1e-4), name
    assert logged["train/student_loops"] == expected["train/student_loops"]
    assert logged["train/gradient_norm"] == pytest.approx(expected["train/gradient_norm"], rel=1e-3)


def test_two_nodes_of_two_devices_train_as_one_does(home: Path) -> None:
    """Weights are shared out within a node, and each node has a copy; srun starts the processes."""
    flags = [*SGD, SHARDED, "--trainer.devices=2", "--trainer.num_nodes=2", "--run_dir=runs/nodes"]
    elt_on_ranks(["fit", *SETTINGS, *flags], home, 4, nodes=2, launcher="srun")
    assert_as_one_device(last(home / "runs" / "nodes"), last(home / "runs" / "sgd"))


@pytest.mark.parametrize(
    ("begun", "ranks", "strategy"),
    [
        ("adam/checkpoints/step_2.ckpt", 2, [SHARDED]),
        ("adam/checkpoints/step_4.ckpt", 2, [DDP]),
        ("folders/checkpoints/step_2.ckpt", 1, [SHARDED]),
        ("folders/checkpoints/step_4.ckpt", 2, [SHARDED]),
        ("adam_llel/checkpoints/step_2.ckpt", 1, []),
    ],
    ids=["one to two sharded", "one to two", "folder of two to one", "folder of two to two", "file of two to one"],
)
def test_a_run_goes_on_with_another_number_of_devices(
    home: Path, in_folders: Path, begun: str, ranks: int, strategy: list[str]
) -> None:
    name = re.sub(r"\W", "_", f"{begun}_{ranks}_{strategy}")
    if not (home / "runs" / begun).exists():  # this test alone was asked for
        flags = [*ADAM, SHARDED, "--trainer.devices=2", "--run_dir=runs/adam_llel"]
        elt_on_ranks(["fit", *SETTINGS, *flags], home, 2)
    flags = [*ADAM, *strategy, f"--trainer.devices={ranks}", f"--ckpt_path=runs/{begun}", f"--run_dir=runs/{name}"]
    elt_on_ranks(["fit", *SETTINGS, *flags], home, ranks)
    assert_as_one_device(last(home / "runs" / name), last(home / "runs" / "adam"))


def test_a_folder_is_a_checkpoint_to_every_command(home: Path, in_folders: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(home)
    folder = in_folders / "checkpoints" / "last.ckpt"
    assert not list(folder.parent.glob(".*")), "something unfinished was left"
    assert {path.name for path in folder.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
    from_folder, from_file = read_checkpoint(folder), last(home / "runs" / "adam")
    for name, weight in from_file["ema"]["weights"].items():
        torch.testing.assert_close(from_folder["ema"]["weights"][name], weight, rtol=1e-4, atol=TOLERANCE)
    assert main(["sample", "--ckpt_path", str(folder), "--num=2", "--output=sampled.png"]) == 0
    assert main(["export", "--ckpt_path", str(folder), "--output=exported"]) == 0
    assert main(["test", "--ckpt_path", str(folder), "--trainer.accelerator=cpu"]) == 2
    assert "is a sharded checkpoint: read it with --trainer.strategy=model_parallel" in capsys.readouterr().err


def test_a_damaged_folder_is_refused_and_no_code_in_it_is_run(in_folders: Path, tmp_path: Path, capsys: Any) -> None:
    import pickle
    import shutil

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    for name, damage in (("pickle", pickle.dumps(Harm())), ("cut", b"\x80")):
        folder = Path(shutil.copytree((in_folders / "checkpoints" / "last.ckpt").resolve(), tmp_path / name))
        (folder / ".metadata").write_bytes(damage)
        assert main(["sample", "--ckpt_path", str(folder), "--output", str(tmp_path / "x.png")]) == 2
        assert "is not a readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["ddp", "sharded"])
def test_two_devices_measure_and_draw_what_one_does(home: Path, strategy: str) -> None:
    """Seven samples, one at once: one device draws three and the other four, which takes them three and four calls."""
    checkpoint = ["--ckpt_path=runs/adam/checkpoints/last.ckpt", "--trainer.accelerator=cpu"]
    test = [*checkpoint, "--loops=1,4", "--num_samples=7", "--loop_metrics.batch_size=1", "--save_samples=samples.npz"]
    predict = [*checkpoint, "--num_samples=7", "--samples.batch_size=1"]
    rows, samples = [], []
    for ranks, name in ((1, "one"), (2, strategy[-4:])):
        flags = [strategy, f"--trainer.devices={ranks}"] if ranks == 2 else []
        elt_on_ranks(["test", *test, *flags, f"--run_dir=runs/test_{name}_{strategy[-4:]}"], home, ranks)
        elt_on_ranks(["predict", *predict, *flags, f"--run_dir=runs/predict_{name}_{strategy[-4:]}"], home, ranks)
        rows.append(json.loads((home / f"runs/test_{name}_{strategy[-4:]}/loops.json").read_text())["rows"])
        drawn = [f"test_{name}_{strategy[-4:]}/samples_L4.npz", f"predict_{name}_{strategy[-4:]}/samples.npz"]
        samples.append([np.load(home / "runs" / path) for path in drawn])
    for one, two in zip(*rows, strict=True):
        for metric in one["metrics"]:
            assert two["metrics"][metric]["mean"] == pytest.approx(one["metrics"][metric]["mean"], rel=1e-5)
    for one, two in zip(*samples, strict=True):
        assert np.array_equal(one["arr_0"], two["arr_0"])
        assert one["labels"].tolist() == two["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def pixel_index(counts: list[int]) -> ShardIndex:
    """An index of shards of pictures of 8×8 pixels."""
    shape = (3, 8, 8)
    return replace(token_index(counts), image_size=8, input_shape=shape, stored_shape=shape, codebook_size=None)


def test_uneven_shards_are_read_to_the_end_by_sharded_devices(tmp_path: Path) -> None:
    """Shards of 9, 1 and 3 samples: three steps of an epoch, and a validation of 13 in batches of two."""
    write_shards(tmp_path / "shards", pixel_index([9, 1, 3]))
    (tmp_path / "small.yaml").write_text(SHARD_CONFIG)
    for ranks, flags in ((1, []), (2, [SHARDED, "--trainer.devices=2"])):
        elt_on_ranks(["fit", "--config=small.yaml", *flags, f"--run_dir=run_{ranks}"], tmp_path, ranks)
        assert last(tmp_path / f"run_{ranks}")["global_step"] == 7
        test = ["test", "--config=small.yaml", "--ckpt_path=run_1/checkpoints/last.ckpt", f"--run_dir=test_{ranks}"]
        elt_on_ranks([*test, *flags], tmp_path, ranks)
    one, two = (json.loads((tmp_path / f"test_{ranks}/loops.json").read_text())["rows"] for ranks in (1, 2))
    assert [row["metrics"]["loss"]["mean"] for row in two] == pytest.approx(
        [row["metrics"]["loss"]["mean"] for row in one], rel=1e-5
    )


SHARD_CONFIG = """
data:
  class_path: elt_lightning.data.imagenet.ImageNetDataModule
  init_args: {training_shards: shards, val_shards: shards, batch_size: 4, num_workers: 1}
model:
  network:
    class_path: elt_lightning.networks.diffusion.LoopedDiT
    init_args: {num_layers: 1, patch_size: 4, width: 8, num_heads: 2}
  process: GaussianProcess
  objective: {class_path: elt_lightning.objectives.diffusion.DiffusionObjective}
  distillation: {max_loops: 2}
  sampler:
    class_path: elt_lightning.samplers.diffusion.DDIMSampler
    init_args: {steps: 2}
trainer: {max_steps: 7, check_val_every_n_epoch: null, val_check_interval: 3, accelerator: cpu}
loop_metrics: {num_validation_samples: 0, num_samples: 2}
"""


def refusal(home: Path, ranks: int, *flags: str) -> str:
    (line,) = {
        line
        for log in elt_on_ranks(["fit", *SETTINGS, "--run_dir=runs/refused", *flags], home, ranks, status=2)
        for line in log.splitlines()
        if line.startswith("elt: error: ")
    }
    assert not (home / "runs" / "refused" / "checkpoints").exists()
    return line


def test_what_cannot_be_shared_out_is_refused_in_one_line(home: Path) -> None:
    line = refusal(home, 3, "--trainer.devices=3", DDP, "--data.init_args.batch_size=8")
    assert "batch_size 8 does not split into 3 devices" in line
    for name in ("fsdp", "deepspeed_stage_3"):
        line = refusal(home, 1, f"--trainer.strategy={name}", "--run_dir=runs/other")
        assert f"{name} is not supported" in line
        assert "model_parallel" in line


def test_fewer_val_samples_than_devices_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", pixel_index([8]))
    write_shards(tmp_path / "few", pixel_index([1]))
    (tmp_path / "small.yaml").write_text(SHARD_CONFIG.replace("val_shards: shards", "val_shards: few"))
    logs = elt_on_ranks(
        ["fit", "--config=small.yaml", DDP, "--trainer.devices=2", "--run_dir=run"], tmp_path, 2, status=2
    )
    assert all("1 held-out samples do not suffice for 2 devices" in log for log in logs)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_the_scripts_of_the_documentation_train_and_go_on(launcher: str, home: Path) -> None:
    """The `elt` line of each script, as the launcher runs it, begun and then gone on with."""
    (script,) = (
        text for text in re.findall(r"```bash\n(.*?)```", SCRIPTS.read_text(), re.S) if f"\n{launcher} " in text
    )
    line = script.replace("\\\n", " ").partition(f"\n{launcher} ")[2].partition("\n")[0]
    words = shlex.split(line.partition("elt_lightning " if launcher == "torchrun" else "elt ")[2])
    assert words[0] == "fit"
    values = {"$CONFIG": str(CONFIGS / "digits.yaml"), "$RUN": f"runs/{launcher}", "$NODES": "1", "$GPUS": "2"}
    values |= {"$SLURM_NNODES": "1", "$SLURM_GPUS_ON_NODE": "2"}
    for steps, resumed in ((4, []), (6, ["--ckpt_path", f"runs/{launcher}/checkpoints/last.ckpt"])):
        flags: list[str] = []
        for word in words:
            flags += resumed if word == "${RESUME[@]}" else [re.sub(r"\$\w+", lambda m: values[m[0]], word)]
        small = [*SETTINGS[2:], *ADAM, f"--trainer.max_steps={steps}"]
        elt_on_ranks([*flags, *small], home, 2, launcher=launcher)
        assert last(home / "runs" / launcher)["global_step"] == steps

"""`elt plan` against counts made another way: formulas by hand, real tensors, real files."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from shard_files import token_index, write_shards
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.cli import main
from elt_lightning.commands.plan import bytes_in_shard, count_validations, in_gib, in_time, num_steps, read
from elt_lightning.commands.planning import MOST_REHEARSED, Settings, make_plan, rehearse, rehearse_at
from elt_lightning.data.base import Batch
from elt_lightning.data.published import imagenet_moments
from elt_lightning.errors import UserError
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD, Mode
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.samplers.diffusion import DDIMSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule
from elt_lightning.training.precision import PRECISIONS, Types

CONFIGS = Path(__file__).parent.parent / "configs"
IMAGENET = CONFIGS / "imagenet256"
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def module_of(name: str) -> ELTModule:
    return read([f"--config={IMAGENET / name}.yaml"])[2]


@pytest.mark.parametrize(
    ("name", "layers", "width", "published"),
    [
        ("maskgit_l", 24, 1024, 303e6),
        ("maskgit_xl", 28, 1152, 446e6),
        ("elt_l_8n3l", 8, 1024, 101e6),
        ("elt_l_12n2l", 12, 1024, 152e6),
        ("elt_xl_7n4l", 7, 1152, 111e6),
    ],
)
def test_table_1_counts_the_backbone(name: str, layers: int, width: int, published: float) -> None:
    module = module_of(name)
    assert all(parameter.is_meta for parameter in module.parameters())
    backbone, total = module.num_parameters()
    assert backbone == layers * (12 * width**2 + 13 * width)
    assert backbone == pytest.approx(published, rel=0.01)
    tables = (1024 + 1) + (1000 + 1) + (256 + 1)  # codes, classes, positions
    assert total == backbone + tables * width + 2 * width + (width**2 + width) + 2 * width + 1024


@pytest.mark.parametrize(
    ("name", "layers", "published", "tolerance"),
    [
        ("elt_1n32l", 1, 69e6, 0.01),
        ("elt_4n8l", 4, 271e6, 0.01),
        ("elt_8n4l", 8, 539e6, 0.01),
        ("elt_16n2l", 16, 1.1e9, 0.025),
        ("dit_16", 16, 1.1e9, 0.025),
        ("dit_32", 32, 2.1e9, 0.025),
    ],
)
def test_table_2_counts_the_network(name: str, layers: int, published: float, tolerance: float) -> None:
    module = module_of(name)
    assert all(parameter.is_meta for parameter in module.parameters())
    backbone, total = module.num_parameters()
    d, m, c, head = 2048, 8192, 1024, 128
    matrices = 4 * d**2 + 2 * d * m + 2 * m * c
    vectors = (3 * d + d + m + d + 2 * m) + 2 * d + 4 * head  # biases, norms, norms of queries and keys
    assert backbone == layers * (matrices + vectors)
    assert total == pytest.approx(published, rel=tolerance)


def small_masked(max_loops: int = 3, **settings: float) -> ELTModule:
    return ELTModule(
        network=LoopedMaskedTransformer(50, (4, 4), 10, num_layers=2, width=32, num_heads=4, **settings),  # type: ignore[arg-type]
        process=MaskingProcess(50),
        objective=MaskedObjective,
        distillation=ILSD(max_loops),
        sampler=partial(MaskGITSampler, steps=5, guidance=Guidance(scale=2.0)),
        num_classes=10,
    )


def small_diffusion(block: str = "film", recall: bool = False) -> ELTModule:
    return ELTModule(
        network=LoopedDiT((4, 8, 8), 10, num_layers=2, width=32, num_heads=4, block=block, recall=recall),  # type: ignore[arg-type]
        process=GaussianProcess(),
        objective=DiffusionObjective,
        distillation=ILSD(3),
        sampler=partial(DDIMSampler, steps=4),
        num_classes=10,
    )


def really_kept(module: ELTModule, num_samples: int, types: Types) -> int:
    """Run the whole loss of a training step on real tensors: bytes that autograd keeps, weights left out."""
    network = module.network.train()
    shape = (num_samples, *network.sample_shape)
    x = torch.randint(50, shape) if module.codebook_size else torch.randn(shape)
    batch = Batch(x, torch.randint(10, (num_samples,)), torch.arange(num_samples))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with types.context("cpu"), saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = module.loss(batch, step=7, progress=0.3)
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in weights)
    loss.backward()
    return kept


@pytest.mark.parametrize(
    "make",
    [
        small_masked,
        small_diffusion,
        lambda: small_diffusion("adaln_zero"),
        lambda: small_masked(recall=True),
        lambda: small_diffusion("adaln_zero", recall=True),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_activations_are_what_a_real_training_loss_keeps(make: Callable[[], ELTModule], precision: str) -> None:
    module, types = make(), PRECISIONS[precision]
    kept = rehearse(module, types)
    module.to(types.weights)
    if types.autocast is not None:  # a GPU's autocast computes layer norms in float32, a CPU's in what it is given
        for norm in module.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    assert kept.per_sample * 5 + kept.copies == pytest.approx(really_kept(module, 5, types), rel=1e-3)


def test_autocast_keeps_one_copy_of_the_shared_weights_for_all_loops() -> None:
    module = small_masked()
    shared, twice_shared = (rehearse(of, PRECISIONS["bf16-mixed"]).copies for of in (module, small_masked(max_loops=6)))
    matrices = [layer.weight for layer in module.network.backbone.modules() if isinstance(layer, nn.Linear)]
    assert sum(2 * matrix.numel() for matrix in matrices) <= shared == twice_shared


def test_recomputed_loops_keep_their_first_states_and_one_loop() -> None:
    three, six = (rehearse(small_masked(max_loops=loops), PRECISIONS["32-true"]) for loops in (3, 6))
    state = (1 + 16) * 32 * 4  # tokens, width, bytes
    assert six.recomputing - three.recomputing == 3 * state
    loop = (six.per_sample - three.per_sample) / 3
    ends = three.per_sample - 3 * loop
    assert three.recomputing == ends + 3 * state + loop


@pytest.mark.parametrize(
    "mode", ["ilsd", *(pytest.param(m, marks=pytest.mark.slow) for m in ("vanilla", "deep_supervision"))]
)
def test_what_many_loops_keep_follows_from_a_few(mode: Mode) -> None:
    module, types = small_masked(), PRECISIONS["bf16-mixed"]
    module.distillation = ILSD(MOST_REHEARSED + 8, min_loops=MOST_REHEARSED, mode=mode)
    exits = module.distillation.student_exits(module.seed, 0)
    assert rehearse(module, types) == rehearse_at(module, types, module.max_loops, exits)


def test_dropout_keeps_what_it_does_on_a_gpu() -> None:
    """A byte for each element that is dropped or not: the residual branches and the embedding; nothing of attention."""
    without, with_dropout = (rehearse(small_masked(dropout=rate), PRECISIONS["32-true"]) for rate in (0.0, 0.1))
    elements = (1 + 16) * 32
    more = 3 * 2 * 2 * elements + elements  # loops of two layers of two branches, and the embedding
    assert with_dropout.per_sample - without.per_sample == pytest.approx(more, rel=0.01)


@pytest.mark.parametrize("exits", [(), (1,), (1, 2, 3)])
@pytest.mark.parametrize("make", [small_masked, small_diffusion, lambda: small_diffusion("adaln_zero")])
def test_macs_are_those_that_torch_counts(make: Callable[[], ELTModule], exits: tuple[int, ...]) -> None:
    network = make().network.train()
    is_masked = isinstance(network, LoopedMaskedTransformer)
    x = torch.zeros(1, 16, dtype=torch.int64) if is_masked else torch.zeros(1, 4, 8, 8)
    attention = 2 * (17**2 if is_masked else 16**2) * 32 * 2 * 3  # QK and PV, tokens, width, layers, loops
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, Condition(torch.zeros(1, dtype=torch.int64), torch.zeros(1)), 3, exits)
    missing = network.macs(3, exits) - counter.get_total_flops() // 2
    assert missing in (0, attention)  # torch may leave out the CPU's fused attention


def settings(**changes: object) -> Settings:
    plain: dict[str, object] = {
        "precision": "32-true",
        "devices": 1,
        "micro_batch_size": 4,
        "batch_size": 8,
        "steps": 10,
        "num_validations": 2,
        "num_validation_samples": 3,
        "num_val": 7,
        "num_test_samples": 11,
        "loops": [1, 2, 3],
        "swept": {},
        "num_checkpoints": 1,
        "tflops": 1.0,
        "utilisation": 0.5,
        "device_memory": 1.0,
    }
    return Settings(**(plain | changes))  # type: ignore[arg-type]


def test_memory_of_weights_optimiser_and_average() -> None:
    module = small_masked()
    _, total = module.num_parameters()
    plan = make_plan(module, settings())
    assert list(plan["resident"].values()) == [4 * total, 4 * total, 0, 8 * total, 4 * total, plan["kept"]["copies"]]
    on_two = make_plan(module, settings(devices=2))
    assert sum(on_two["resident"].values()) == sum(plan["resident"].values()) + 4 * total
    half = make_plan(module, settings(precision="bf16-true"))["resident"]
    assert (half["weights"], half["the optimiser's state"]) == (2 * total, 4 * total)
    assert half["averaged weights"] == 4 * total
    module.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1)
    plan = make_plan(module, settings())
    assert plan["resident"]["the optimiser's state"] == 0
    assert plan["checkpoint_bytes"] == 8 * total


@pytest.mark.slow
def test_memory_grows_with_the_micro_batch_and_the_largest_fits_and_no_more() -> None:
    module = small_masked()
    for device_memory in (0.0001, 0.02):
        plan = make_plan(module, settings(device_memory=device_memory))
        largest, available = plan["largest_batch"], device_memory * 2**30
        assert plan["largest_batch_recomputing"] >= largest
        assert (largest > 0) == (device_memory == 0.02)
        if largest:
            full, one_more = (make_plan(module, settings(micro_batch_size=size)) for size in (largest, largest + 1))
            assert full["memory"] <= available < one_more["memory"]
            assert full["memory_recomputing"] < full["memory"]


@pytest.mark.slow
def test_hours_of_training_validation_and_test_by_hand() -> None:
    """8N×3L at width 1024: 256 tokens and a class, 1024 codes; 24 sampling steps, each with two branches."""
    module = module_of("elt_l_8n3l")
    tokens, width = 257, 1024
    loop = 8 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    head = 256 * (width**2 + width * 1024)
    planned = settings(
        batch_size=512, steps=675_540, loops=[1, 2, 3], num_test_samples=50_000, tflops=989.0, utilisation=0.4
    )
    plan = make_plan(module, planned)
    image = 3 * (3 * loop + 2 * head)
    assert plan["image_macs"] == image
    assert plan["training_hours"] == pytest.approx(675_540 * 512 * 2 * image / 395.6e12 / 3600)
    assert plan["training_hours"] == pytest.approx(119.4, rel=1e-3)
    samples = [24 * 2 * (loops * loop + head) for loops in (1, 2, 3)]
    assert list(plan["sample_macs"].values()) == samples
    assert plan["test_hours"][3] == pytest.approx(50_000 * 2 * samples[2] / 395.6e12 / 3600)
    validation = 3 * sum(samples) + 7 * (3 * loop + 3 * head)
    assert plan["validation_hours"] == pytest.approx(2 * 2 * validation / 395.6e12 / 3600)

    module.network.backbone.activation_checkpointing = True
    assert make_plan(module, planned)["image_macs"] == image + 3 * loop
    two_scales = make_plan(module, settings(swept={"guidance": [1.0, 2.0]}, loops=[2]))
    assert two_scales["test_hours"][2] == pytest.approx(11 * 2 * (24 + 48) * (2 * loop + head) / 0.5e12 / 3600)


def test_loop_counts_at_or_below_the_weak_exit_are_planned_as_they_are_drawn_not_at_all() -> None:
    module = small_masked()
    module.sampler = module.sampler.with_settings(exit_scale=0.5, weak_loops=1)
    plan = make_plan(module, settings())
    assert list(plan["sample_macs"]) == [2, 3]
    assert plan["sample_macs"][2] == 5 * 2 * module.network.macs(2, (1,))
    assert plan["test_hours"][1] == 0 < plan["test_hours"][2]


def trainer(**changes: object) -> dict[str, object]:
    plain = {"max_steps": -1, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 100}
    return plain | {"limit_val_batches": None} | changes


def test_steps_come_from_steps_or_whole_batches_of_epochs() -> None:
    assert num_steps(trainer(max_steps=7), None) == 7
    assert num_steps(trainer(max_epochs=270), 2502) == 270 * 2502
    assert num_steps(trainer(max_epochs=2, max_steps=30), 10) == 20
    assert num_steps(trainer(max_epochs=2, max_steps=15), 10) == 15
    with pytest.raises(UserError, match="--num_samples"):
        num_steps(trainer(max_epochs=2), None)
    with pytest.raises(UserError, match="max_steps"):
        num_steps(trainer(), 10)


def test_validations_are_counted_in_optimiser_steps() -> None:
    assert count_validations(trainer(), 1000, None) == 10
    assert count_validations(trainer(limit_val_batches=0), 1000, None) == 0
    each_epoch = trainer(check_val_every_n_epoch=2, val_check_interval=1.0)
    assert count_validations(each_epoch, 1000, 100) == 5
    assert count_validations(each_epoch | {"val_check_interval": 0.25}, 1000, 100) == 20
    assert count_validations(each_epoch, 1000, None) == 0


def test_disk_is_what_shards_take(tmp_path: Path) -> None:
    for copies in (1, 2):
        index = token_index([400], copies=copies)
        write_shards(tmp_path / str(copies), index)
        written = (tmp_path / str(copies) / "00000.tar").stat().st_size
        planned = 400 * bytes_in_shard(index, copies)
        assert written == math.ceil((planned + 1024) / 10_240) * 10_240  # a tar ends in zeros up to a whole record
    header, block = 512, 512
    sample = 2 * header + math.ceil((128 + 2 * 8 * 32 * 32) / block) * block + block
    assert bytes_in_shard(imagenet_moments(4), 1) == sample


def test_times_and_memory_are_written_in_units_that_suit() -> None:
    assert [in_time(hours, "GPU-") for hours in (1234.4, 99.5, 1, 0.5)] == [
        "1,234 GPU-hours", "100 GPU-hours", "1.00 GPU-hours", "30.0 GPU-minutes",
    ]  # fmt: skip
    assert [in_time(hours) for hours in (1 / 60, 0.016, 2e-6, 0)] == [
        "1.00 minutes", "57.6 seconds", "0.00720 seconds", "0.00 seconds",
    ]  # fmt: skip
    assert [in_gib(amount) for amount in (2**31, 2**20, 0)] == ["2.00 GiB", "1.00 MiB", "0.00 MiB"]


def test_imagenet_is_assumed_where_there_are_no_shards(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.network.init_args.num_layers=4", "--devices=8", "--json=plan.json", "--device-memory=80"]
    assert main(["plan", "--config", str(IMAGENET / "elt_8n4l.yaml"), *flags, "--tflops=500"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "ImageNet-1k",
        "1,281,167",
        "index.json",
        "assumptions",
        "GPU-hours",
        "500 TFLOP/s",
        "21.0 GB",
        "80 GiB",
    ):
        assert part in printed
    content = json.loads(Path("plan.json").read_text())
    assert content["data"]["input_shape"] == [4, 32, 32]
    assert content["parameters"] == pytest.approx(271e6, rel=0.01)
    assert content["settings"]["micro_batch_size"] == 32
    assert content["settings"]["loops"] == [1, 2, 3, 4]
    assert content["settings"]["steps"] == 500_000
    assert content["disk"]["training_codes"] == 1_281_167 * 2 * 8 * 32 * 32
    assert content["memory"] > content["memory_recomputing"]
    assert [path.name for path in Path.cwd().iterdir()] == ["plan.json"]  # nothing was begun


def test_shards_are_asked_where_they_are(tmp_path: Path) -> None:
    places = [write_shards(tmp_path / name, token_index([40], classes=3)) for name in ("train", "val")]
    flags = [f"--data.init_args.training_shards={places[0]}", f"--data.init_args.val_shards={places[1]}"]
    _, data, module = read([f"--config={IMAGENET / 'elt_l_8n3l.yaml'}", *flags])
    assert (data.assumed, data.num_samples, data.num_val) == (None, 40, 40)
    assert data.disk()["training_codes"] == 40 * 4 * 2
    assert (module.num_classes, module.network.sample_shape) == (3, (4,))


def test_data_that_need_no_download_are_asked_and_nothing_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(QUICKSTART), "--data.init_args.micro_batch_size=16"]) == 0
    printed = capsys.readouterr().out
    assert "50,000 training samples, 2,000 held out; 5 classes; 5×5 tokens of 20 codes" in printed
    assert "64 = 1 × 4 × 16" in printed
    assert "assumed" not in printed
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        ([], "--config"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", str(QUICKSTART), "--model.network.init_args.widht=3"], "widht"),
        (["--config", str(QUICKSTART), "--device=3"], "device"),
        (["--config", str(QUICKSTART), "--model.network.init_args.num_heads=5"], "num_heads"),
        (["--config", str(QUICKSTART), "--model.distillation.min_loops=4"], "min_loops"),
        (["--config", str(QUICKSTART), "--devices=7"], "batch_size 64"),
        (["--config", str(QUICKSTART), "--devices=0"], "--devices"),
        (["--config", str(QUICKSTART), "--utilisation=1.1"], "--utilisation"),
        (["--config", str(QUICKSTART), "--tflops=fast"], "--tflops"),
        (["--config", str(QUICKSTART), "--device-memory=0"], "--device_memory"),
        (["--config", str(QUICKSTART), "--num_samples=63"], "63"),
        (["--config", str(QUICKSTART), "--trainer.max_steps=-1"], "max_steps"),
        (["--config", str(QUICKSTART), "--trainer.precision=transformer-engine"], "transformer-engine"),
        (["--config", str(QUICKSTART), "--ckpt_path=missing.ckpt"], "missing.ckpt"),
        (["--config", "tensors.yaml"], "squares.safetensors"),
        (["--config", str(QUICKSTART), "--json", "tensors.yaml"], "--overwrite"),
    ],
)
def test_a_wrong_command_line_gives_one_clear_line(
    arguments: list[str], telling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        "class_path": "elt_lightning.data.tensors.TensorDataModule",
        "init_args": {"training_files": ["squares.safetensors"], "val_files": ["squares.safetensors"]},
    }
    tensors["init_args"] |= {"num_classes": 5, "codebook_size": 20}  # type: ignore[operator]
    Path("tensors.yaml").write_text(json.dumps({"base": str(QUICKSTART)} | {"data": tensors}))
    assert main(["plan", *arguments]) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("elt: error: ")]
    assert len(complaints) == 1
    assert telling in complaints[0]

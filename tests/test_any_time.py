"""Loops where they pay: guidance by an exit, loops that end by themselves, schedules of loops over sampling steps."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from small_runs import SMALL_SQUARES
from test_recall import CLASSES, LATENTS, TOKENS, V, dit, masked
from torch import Tensor

from elt_lightning.checkpoints import shipped
from elt_lightning.cli import main
from elt_lightning.errors import UserError
from elt_lightning.evaluation.calibration import Tried, pareto_front
from elt_lightning.evaluation.loop_metrics import LoopMetrics
from elt_lightning.evaluation.plans import OF_MODEL, of_model, read_plan
from elt_lightning.evaluation.spent import SpentLoops
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import SETTINGS, Sampler
from elt_lightning.samplers.diffusion import DDIMSampler, DDPMSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.guided_steps import GuidedSteps
from elt_lightning.samplers.loop_schedule import LoopSchedule
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.announce import macs_per_second
from elt_lightning.training.module import ELTModule


class Counting:
    """Calls a network, and notes of each call: rows, loops, exits."""

    def __init__(self, network: LoopedNetwork) -> None:
        self.network, self.calls = network, list[tuple[int, int, tuple[int, ...]]]()

    def __call__(
        self, x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        self.calls.append((len(x), loops, tuple(exits)))
        with torch.no_grad():
            return self.network(x, condition, loops, exits, state)


def module_of(network: LoopedNetwork, sampler: Sampler) -> ELTModule:
    is_masked = isinstance(sampler, MaskGITSampler)
    objective = MaskedObjective if is_masked else DiffusionObjective
    return ELTModule(network, TOKENS if is_masked else LATENTS, objective, ILSD(4), lambda *_: sampler, CLASSES)


@pytest.mark.parametrize("schedule", ["constant", "linear", "power_cosine"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_exit_guidance_equals_its_formula_in_the_passes_of_class_guidance(scale: float, schedule: str) -> None:
    """In float64, alone and with class guidance; one pass a step, its head once more where exit guidance acts."""
    network, x, num_steps = masked(recall=False).double(), torch.randint(0, V + 1, (4, 9)), 5
    guidance = Guidance(
        scale, "linear", 1.5, exit_scale=0.7, weak_loops=2, exit_schedule=schedule, exit_interval=(0.2, 0.9)
    )  # type: ignore[arg-type]
    sampler = MaskGITSampler(TOKENS, CLASSES, num_steps, guidance=guidance)
    counting, told = Counting(network), Condition(torch.arange(4) % CLASSES)
    steps = GuidedSteps(sampler, counting, 3)
    null = told.with_labels(torch.full((4,), CLASSES))
    branches = 1 if scale == 1 else 2
    for step in range(num_steps):
        share = (step + 1) / num_steps
        risen = {"constant": 1.0, "linear": share, "power_cosine": 0.5 * (1 - math.cos(math.pi * share**1.5))}
        w = 0.7 * risen[schedule] if 0.2 <= step / num_steps < 0.9 else 0.0
        s = 1 + (scale - 1) * share
        with torch.no_grad():
            strong, weak = ([network(x, which, loops).predictions[loops] for which in (told, null)] for loops in (3, 2))
        of_class, of_null = (p + w * (p - q) for p, q in zip(strong, weak, strict=True))
        torch.testing.assert_close(
            steps(step, x, told), of_null + s * (of_class - of_null) if branches == 2 else of_class, rtol=0, atol=1e-12
        )
        assert counting.calls[step] == (4 * branches, 3, (2,) if w else ())
    module = module_of(network, sampler)
    one_head = network.macs(3, (2,)) - network.macs(3)
    assert one_head > 0
    assert module.macs_per_sample(3) == branches * (num_steps * network.macs(3) + 4 * one_head)


def test_a_weak_exit_at_or_beyond_the_last_loop_is_refused() -> None:
    sampler = MaskGITSampler(TOKENS, CLASSES, 4, guidance=Guidance(exit_scale=0.5, weak_loops=2))
    assert sampler.loops_per_step(3) == [3] * 4
    for loops in (1, 2, [3, 3, 2, 3]):
        with pytest.raises(ValueError, match="exit 2, which must come before the last"):
            sampler.loops_per_step(loops)
    with pytest.raises(ValueError, match="weak_loops alone changes nothing"):  # which a flag would do in silence
        MaskGITSampler(TOKENS, CLASSES, 4).with_settings(weak_loops=2)
    assert MaskGITSampler(TOKENS, CLASSES, 4).with_settings(exit_scale=0.5, weak_loops=2).guidance.weak_loops == 2
    assert sampler.with_settings(weak_loops=1).guidance.weak_loops == 1
    with pytest.raises(UserError, match="steps must be at most"):
        sampler.with_settings(steps=10**7)
    with pytest.raises(ValueError, match="weak_loops >= 1"):
        Guidance(weak_loops=0)
    with pytest.raises(ValueError, match="exit_interval"):
        Guidance(exit_interval=(0.5, 0.5))


def test_a_prediction_may_have_loops_that_a_sweep_up_to_l_max_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    """`elt predict --loops 8 --exit_scale 0.5 --weak_loops 4`, trained at four; validation names what it leaves out."""
    sampler = MaskGITSampler(TOKENS, CLASSES, 2, guidance=Guidance(exit_scale=0.5, weak_loops=4))
    module, metrics, trainer = module_of(masked(), sampler), LoopMetrics(), Trainer(logger=False, devices=1)
    metrics.setup(trainer, module, "predict")
    with pytest.raises(ValueError, match="no setting is left to measure"):
        metrics.setup(trainer, module, "test")
    module.sampler = sampler.with_settings(weak_loops=2)
    capsys.readouterr()
    metrics.setup(trainer, module, "validate")
    assert [line.partition(" is left out")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"loops {loops} with weak_loops 2" for loops in (1, 2)
    ]


def test_schedules_of_loops_have_the_same_sum_and_fall_or_rise() -> None:
    for loops in (1, 3, 4, 7):
        for num_steps in (1, 2, 5, 12):
            falling, rising = (LoopSchedule(shape).per_step(loops, num_steps) for shape in ("falling", "rising"))  # type: ignore[arg-type]
            assert falling == rising[::-1] == sorted(falling, reverse=True)
            assert sum(falling) == loops * num_steps
            assert num_steps == 1 or (falling[0], falling[-1]) == (2 * loops - 1, 1)
    sampler = MaskGITSampler(TOKENS, CLASSES, 3, loop_schedule=LoopSchedule("falling"))
    assert sampler.network_calls(2) == [(3, ()), (2, ()), (1, ())]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("make", [MaskGITSampler, DDIMSampler, DDPMSampler])
def test_a_loop_that_ends_by_itself_is_each_samples_own(make: Callable[..., Sampler], carried: bool) -> None:
    """Samples and loops are the same alone and among others; where all loops are run, those of a plain pass."""
    is_masked = make is MaskGITSampler
    network = (masked if is_masked else dit)().double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(4 if is_masked else 1)  # so that post-norm blocks do not settle at once
    guidance = Guidance(2.0, interval=(0.3, 0.8), exit_scale=0.5, exit_interval=(0.5, 1.0))
    sampler = make(TOKENS if is_masked else LATENTS, CLASSES, steps=4, guidance=guidance, carry_state=carried)
    module = module_of(network, sampler)
    labels, seeds = torch.arange(6) % CLASSES, sample_seeds(1, torch.arange(6))
    ending = sampler.with_settings(tolerance=1e-5 if is_masked else 0.1)
    spent: list[Tensor] = []
    together = module.sample(labels, 12, seeds, None, ending, spent)
    loops = torch.stack(spent, 1)
    assert 1 < loops.mean() < 12
    assert loops.std(0).max() > 0
    for place in range(6):
        alone: list[Tensor] = []
        own = module.sample(labels[place : place + 1], 12, seeds[place : place + 1], None, ending, alone)
        torch.testing.assert_close(own[0], together[place], rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.stack(alone, 1)[0], loops[place])
    never = sampler.with_settings(tolerance=0.0)
    every = module.sample(labels, 3, seeds, None, never, spent := [])
    torch.testing.assert_close(every, module.sample(labels, 3, seeds), rtol=1e-5, atol=1e-5)
    assert torch.stack(spent).mean() > 2.9


def test_samples_that_have_arrived_leave_the_batch() -> None:
    """What is computed falls with the loops: passes see as many rows as are still changing."""
    network, x = masked().double(), torch.full((5, 9), V)
    sampler = MaskGITSampler(TOKENS, CLASSES, 3, loop_schedule=LoopSchedule(tolerance=0.05), carry_state=True)
    counting, spent = Counting(network), list[Tensor]()
    steps = GuidedSteps(sampler, counting, 9, spent)
    for step in range(3):
        x[:, : 2 * step] = torch.arange(5)[:, None]
        steps(step, x, Condition(torch.arange(5) % CLASSES))
    assert sum(rows for rows, _, _ in counting.calls) == int(torch.stack(spent).sum()) < 3 * 5 * 9
    assert {call[1:] for call in counting.calls} == {(1, ())}
    counted = SpentLoops([9] * 3)
    counted.update(torch.stack(spent, 1))
    per_step, per_sample = counted.compute()
    assert per_step.mean == pytest.approx(torch.stack(spent).mean(1).tolist())
    assert per_sample.mean == pytest.approx([torch.stack(spent).mean().item()])
    assert per_sample.quantiles["p50"] == pytest.approx([torch.stack(spent).mean(0).median().item()])


def test_the_time_of_long_work_is_measured_where_few_loops_would_end_at_the_weak_exit() -> None:
    """32 falling loops have five left where exit guidance still acts; the few that are timed would have two."""
    guidance = Guidance(exit_scale=0.5, weak_loops=2, exit_interval=(0.0, 0.9))
    sampler = MaskGITSampler(TOKENS, CLASSES, 16, guidance=guidance, loop_schedule=LoopSchedule("falling"))
    assert min(sampler.loops_per_step(32)[:15]) == 5
    assert macs_per_second(module_of(masked(), sampler), sampler, 2) > 0


def test_a_plan_is_of_one_model_and_of_values_that_settings_may_have(tmp_path: Path) -> None:
    recipe = {"model": {name: {"class_path": name} for name in OF_MODEL} | {"optimizer": 1}}
    best = {"loops": 2, "steps": 3, "carry_state": True, "guidance": 1.0, "exit_scale": 0, "weak_loops": None}
    best |= {"loop_schedule": "falling", "tolerance": 0.1}
    assert best.keys() == {"loops", *SETTINGS}
    written = {"best": best, "weights": "raw", "model": of_model(recipe)}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(written))
    plan = read_plan(path)
    assert plan.settings == best | {"weights": "raw"}
    plan.check({"model": recipe["model"] | {"optimizer": 2}})
    with pytest.raises(UserError, match="another model, whose sampler differs"):
        plan.check({"model": recipe["model"] | {"sampler": {"class_path": "DDIMSampler"}}})
    wrong = [("loops", "2"), ("steps", 1.5), ("carry_state", 1), ("weak_loops", -1), ("loop_schedule", "up")]
    for name, value in [*wrong, ("tolerance", "x"), ("guidance", -1)]:
        path.write_text(json.dumps(written | {"best": best | {name: value}}))
        with pytest.raises(UserError, match="not written by this version of `elt calibrate`"):
            read_plan(path)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("new.json", "pareto.png exists: choose another --output, or add --overwrite"),
        ("pareto.png", "this is where the picture goes"),
        (".", ". is a folder"),
    ],
)
def test_a_plan_takes_no_files_place(
    output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is measured: the picture beside it may be of a sweep."""
    monkeypatch.chdir(tmp_path)
    Path("pareto.png").write_text("of a sweep")
    assert main(["calibrate", "--ckpt_path=none", "--budget=1", f"--output={output}"]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_is_of_a_checkpoint_whose_data_have_its_tokenizer(
    small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of another tokenizer would be scored without a word."""
    monkeypatch.chdir(small_squares.parents[3])
    content = torch.load(small_squares, weights_only=True)
    content["elt"]["tokenizer"]["sha256"] = "0" * 64
    torch.save(content, tmp_path / "other.ckpt")
    for path, message in (
        (tmp_path / "other.ckpt", "was trained on codes of another tokenizer"),
        (shipped.folder_of("squares"), "is an exported model, not a checkpoint"),
    ):
        assert main(["calibrate", f"--ckpt_path={path}", "--budget=1", f"--output={tmp_path / 'plan.json'}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_front_is_what_nothing_beats(higher_is_better: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    costs, scores = torch.randint(1, 9, (2, 60), generator=generator).tolist()
    tried = [Tried(1, {}, 1.0, cost, float(score)) for cost, score in zip(costs, scores, strict=True)]
    tried.append(Tried(1, {}, 1.0, 0, math.nan))
    points = [(each.macs_per_sample, each.score if higher_is_better else -each.score) for each in tried[:-1]]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    front = pareto_front(tried, higher_is_better)
    found = [(each.macs_per_sample, each.score if higher_is_better else -each.score) for each in front]
    assert found == sorted(set(points) - beaten)


def test_a_tolerance_needs_recall() -> None:
    sampler = MaskGITSampler(TOKENS, CLASSES, 2, loop_schedule=LoopSchedule(tolerance=0.1))
    with pytest.raises(ValueError, match="tolerance needs a network with recall"):
        module_of(masked(recall=False), sampler)


@pytest.mark.slow
def test_commands_sweep_and_use_every_setting(
    small_squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    config = Path(__file__).parent.parent / "configs" / "quickstart_recall.yaml"
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--loop_metrics.num_validation_samples=0"]
    assert main(["fit", "--config", str(config), *SMALL_SQUARES, *steps, "--run_dir=any_time"]) == 0
    checkpoint = ["--ckpt_path", "any_time/checkpoints/last.ckpt"]
    swept = ["--exit_scale", "0,0.5", "--weak_loops", "1,2", "--loops", "1,2,3", "--num_samples", "4"]
    capsys.readouterr()
    assert main(["test", *checkpoint, "--run_dir=any_time/exits", *swept]) == 0
    rows = json.loads(Path("any_time/exits/loops.json").read_text())["rows"]
    pairs = {loops: [(0, None), *((0.5, r) for r in (1, 2) if r < loops)] for loops in (1, 2, 3)}
    assert [(row["loops"], row["exit_scale"], row["weak_loops"]) for row in rows] == [
        (loops, *pair) for loops, of_loops in pairs.items() for pair in of_loops
    ]
    assert "loops 2 with weak_loops 2 is left out" in capsys.readouterr().out
    swept = ["--loops", "auto", "--tolerance", "0.01,0", "--steps", "2,3", "--num_samples", "4"]
    assert main(["test", *checkpoint, "--run_dir=any_time/auto", *swept]) == 0
    rows = json.loads(Path("any_time/auto/loops.json").read_text())["rows"]
    assert [(row["loops"], row["steps"], row["tolerance"]) for row in rows] == [
        (32, count, tolerance) for count in (2, 3) for tolerance in (0.01, 0)
    ]
    assert rows[0]["loops_p10"] <= rows[0]["mean_loops"] < rows[1]["mean_loops"] <= 32
    ratio = rows[0]["macs_per_sample"] / rows[1]["macs_per_sample"]
    assert ratio == pytest.approx(rows[0]["mean_loops"] / rows[1]["mean_loops"])
    assert Path("any_time/auto/loops_spent.png").stat().st_size > 1000
    assert "tolerance" in capsys.readouterr().out
    ending = ["--tolerance=0.01", "--loop_schedule=falling", "--loops=auto"]
    assert main(["predict", *checkpoint, "--run_dir=any_time/predicted", "--num_samples=4", *ending]) == 0
    mean, low, high = map(float, re.findall(r"^loops: (\S+) \((\S+) to (\S+)\)", capsys.readouterr().out, re.M)[0])
    assert 1 <= low <= mean <= high < 32
    assert main(["sample", *checkpoint, "--output=any_time/s.png", "--num=2", *ending]) == 0
    assert "at most 32 loops: " in capsys.readouterr().out
    tried = ["--steps=1,2", "--loops=1,2", "--tolerance=0.01", "--exit_scale=0.5", "--num_samples=4", "--weights=raw"]
    assert main(["calibrate", *checkpoint, "--budget=0.5", *tried, "--output=any_time/plan.json"]) == 0
    assert "left out as without a loop beyond the weak exit" in " ".join(capsys.readouterr().out.split())
    plan = json.loads(Path("any_time/plan.json").read_text())
    assert plan["first_sample"] > 100_000
    assert plan["best"] in plan["front"]
    assert plan["best"]["macs_per_sample"] <= 0.5 * plan["full_recipe"]["macs_per_sample"]
    assert plan["best"]["score"] == max(each["score"] for each in plan["tried"] if each["compute"] <= 0.5)
    assert {each["tolerance"] for each in plan["tried"]} == {None, 0.01}
    assert Path("any_time/pareto.png").stat().st_size > 1000
    planned = ["--plan", "any_time/plan.json"]
    assert main(["test", *checkpoint, *planned, "--num_samples=4", "--run_dir=any_time/planned"]) == 0
    report = json.loads(Path("any_time/planned/loops.json").read_text())
    (row,) = report["rows"]
    found = {name: row[name] for name in ("loops", *SETTINGS)} | {"weights": report["weights"]}
    assert found == read_plan("any_time/plan.json").settings
    for command in (
        ["test", "--run_dir=refused"],
        ["predict", "--run_dir=refused"],
        ["sample", "--output=refused.png"],
    ):
        assert main([*command, "--ckpt_path", str(small_squares), *planned]) == 2
        assert "plan.json is of another model, whose network differs" in capsys.readouterr().err
    assert main(["sample", *checkpoint, *planned, "--num=2", "--output=any_time/planned.png"]) == 0
    assert main(["predict", *checkpoint, "--plan=any_time/exits/loops.json"]) == 2
    assert "was not written by this version of `elt calibrate`" in capsys.readouterr().err
    for command in (["test"], ["predict"], ["sample", "--output=refused.png"]):
        folder = [] if command[0] == "sample" else ["--run_dir=refused"]
        for flags, message in (
            (["--loops", "auto"], "a tolerance must say when"),
            (["--exit_scale", "0.5", "--weak_loops", "4", "--loops", "4"], "which must come before the last"),
        ):
            assert main([*command, *folder, *checkpoint, *flags]) == 2
            assert message in capsys.readouterr().err.strip().splitlines()[-1]

import itertools
import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor

from elt_lightning.data.base import Batch
from elt_lightning.networks.blocks import Block
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.base import Corrupted
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.conditioning import Condition, drop_labels
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule

V, T, B = 7, 6, 5
MODES = ("ilsd", "vanilla", "ground_truth", "distillation", "deep_supervision")


class Case(NamedTuple):
    objective: MaskedObjective
    corrupted: Corrupted


def random_case(seed: int, smoothing: float = 0.1) -> Case:
    torch.manual_seed(seed)
    objective = MaskedObjective(MaskingProcess(V), label_smoothing=smoothing)
    return Case(objective, objective.corrupt(torch.randint(0, V, (B, T)), sample_seeds(seed, torch.arange(B)), seed))


def log_probabilities(logits: Tensor) -> list[list[list[float]]]:
    result = []
    for sample in logits.double().tolist():
        rows = []
        for row in sample:
            normaliser = math.log(math.fsum(math.exp(value) for value in row))
            rows.append([value - normaliser for value in row])
        result.append(rows)
    return result


def ground_truth_by_hand(logits: Tensor, corrupted: Corrupted, smoothing: float) -> float:
    per_sample = []
    for logs, truth, weights in zip(
        log_probabilities(logits), corrupted.target.tolist(), corrupted.weight.tolist(), strict=True
    ):
        hidden = [i for i, weight in enumerate(weights) if weight]
        losses = [-(1 - smoothing) * logs[i][truth[i]] - smoothing / V * math.fsum(logs[i]) for i in hidden]
        per_sample.append(math.fsum(losses) / len(hidden))
    return math.fsum(per_sample) / len(per_sample)


def distillation_by_hand(student: Tensor, teacher: Tensor, corrupted: Corrupted) -> float:
    per_sample = []
    for s, t, weights in zip(
        log_probabilities(student), log_probabilities(teacher), corrupted.weight.tolist(), strict=True
    ):
        hidden = [i for i, weight in enumerate(weights) if weight]
        losses = [-math.fsum(math.exp(t[i][v]) * s[i][v] for v in range(V)) for i in hidden]
        per_sample.append(math.fsum(losses) / len(hidden))
    return math.fsum(per_sample) / len(per_sample)


def loss_by_hand(
    mode: str, logits: dict[int, Tensor], max_loops: int, corrupted: Corrupted, smoothing: float, progress: float
) -> float:
    teacher = ground_truth_by_hand(logits[max_loops], corrupted, smoothing)
    students = [loops for loops in logits if loops != max_loops]
    truth = [ground_truth_by_hand(logits[loops], corrupted, smoothing) for loops in students]
    taught = [distillation_by_hand(logits[loops], logits[max_loops], corrupted) for loops in students]
    match mode:
        case "vanilla":
            return teacher
        case "ilsd":
            return teacher + (1 - progress) * truth[0] + progress * taught[0]
        case "ground_truth":
            return teacher + truth[0]
        case "distillation":
            return teacher + taught[0]
        case "deep_supervision":
            return teacher + sum(truth) / len(students)
    raise AssertionError(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_the_whole_loss_equals_the_formula_in_float64(mode: str, seed: int) -> None:
    objective, corrupted = random_case(seed, smoothing=0.1 * seed)
    distillation = ILSD(max_loops=4, min_loops=1 + seed % 3, mode=mode)
    exits = distillation.student_exits(seed, 3)
    logits = {loops: 3 * torch.randn(B, T, V) for loops in (*exits, 4)}
    progress = float(torch.rand(()))
    loss, terms = distillation.loss(logits, corrupted, objective, progress)
    expected = loss_by_hand(mode, logits, 4, corrupted, 0.1 * seed, progress)
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    assert float(terms["loss"]) == loss.item()
    assert float(terms["loss_teacher"]) == pytest.approx(
        ground_truth_by_hand(logits[4], corrupted, 0.1 * seed), rel=2e-6
    )
    assert not any(isinstance(term, Tensor) and term.requires_grad for term in terms.values())


@pytest.mark.parametrize("seed", range(3))
def test_logged_terms_are_the_terms_of_the_formula(seed: int) -> None:
    objective, corrupted = random_case(seed)
    logits = {2: torch.randn(B, T, V), 5: torch.randn(B, T, V)}
    loss, terms = ILSD(5).loss(logits, corrupted, objective, 0.25)
    assert sorted(terms) == ["lambda", "loss", "loss_distill", "loss_student", "loss_teacher", "student_loops"]
    assert terms["lambda"] == 0.75
    assert terms["student_loops"] == 2
    assert float(terms["loss_student"]) == pytest.approx(ground_truth_by_hand(logits[2], corrupted, 0.1), rel=2e-6)
    assert float(terms["loss_distill"]) == pytest.approx(
        distillation_by_hand(logits[2], logits[5], corrupted), rel=2e-6
    )
    total = terms["loss_teacher"] + 0.75 * terms["loss_student"] + 0.25 * terms["loss_distill"]
    assert float(total) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_the_teacher_gets_no_gradient_from_the_distillation_term(seed: int, progress: float) -> None:
    objective, corrupted = random_case(seed)
    teacher, student = torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, V, requires_grad=True)
    term = objective.distillation(student, teacher, corrupted).sum()
    student_gradient, teacher_gradient = torch.autograd.grad(term, [student, teacher], allow_unused=True)
    assert teacher_gradient is None
    assert student_gradient.abs().sum() > 0

    whole, _ = ILSD(3).loss({1: student, 3: teacher}, corrupted, objective, progress)
    alone = objective.ground_truth(teacher, corrupted).mean()
    assert torch.equal(torch.autograd.grad(whole, teacher)[0], torch.autograd.grad(alone, teacher)[0])


def test_gradients_of_both_paths_meet_in_the_shared_weights_without_the_teacher_being_taught() -> None:
    torch.manual_seed(0)
    network = small_network().double()
    objective, corrupted = random_case(0)
    condition = Condition(torch.randint(0, 4, (B,)))
    weights = list(network.parameters())
    predictions, _ = network(corrupted.inputs, condition, 4, (2,))
    loss, _ = ILSD(4).loss(predictions, corrupted, objective, 0.3)
    ours = torch.autograd.grad(loss, weights)

    with torch.no_grad():
        constant = network(corrupted.inputs, condition, 4).predictions[4].softmax(-1)
    teacher = network(corrupted.inputs, condition, 4).predictions[4].log_softmax(-1)
    student = network(corrupted.inputs, condition, 2).predictions[2].log_softmax(-1)
    share = corrupted.weight.double() / corrupted.weight.double().sum(1, keepdim=True) / B
    smooth = torch.full((B, T, V), 0.1 / V, dtype=torch.float64)
    smooth.scatter_(-1, corrupted.target[..., None], 0.9 + 0.1 / V)
    parts = (smooth, teacher, 1.0), (smooth, student, 0.7), (constant, student, 0.3)
    expected = sum(-weight * (target * logs).sum(-1).mul(share).sum() for target, logs, weight in parts)
    assert isinstance(expected, Tensor)
    for mine, other in zip(ours, torch.autograd.grad(expected, weights), strict=True):
        # The losses are taken in float32.
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_lambda_falls_linearly_from_one_to_zero() -> None:
    distillation = ILSD(4)
    assert distillation.ground_truth_weight(0.0) == 1.0
    assert distillation.ground_truth_weight(0.5) == 0.5
    assert distillation.ground_truth_weight(1.0) == 0.0
    assert distillation.ground_truth_weight(1.2) == 0.0
    at = [distillation.ground_truth_weight(step / 977) for step in range(978)]
    steps = {round(a - b, 12) for a, b in itertools.pairwise(at)}
    assert steps == {round(1 / 977, 12)}


@pytest.mark.parametrize(("mode", "fixed"), [("ground_truth", 1.0), ("distillation", 0.0), ("deep_supervision", 1.0)])
def test_lambda_of_the_ablations_is_fixed(mode: str, fixed: float) -> None:
    assert [ILSD(4, mode=mode).ground_truth_weight(progress) for progress in (0.0, 0.37, 1.0)] == [fixed] * 3


@pytest.mark.parametrize(("min_loops", "max_loops"), [(1, 4), (2, 8), (3, 4), (1, 2)])
@pytest.mark.parametrize("mode", ["ilsd", "ground_truth", "distillation"])
def test_student_exits_are_uniform_below_the_teacher(min_loops: int, max_loops: int, mode: str) -> None:
    distillation = ILSD(max_loops, min_loops, mode)
    exits = [distillation.student_exits(5, step) for step in range(500)]
    assert all(len(students) == 1 for students in exits)
    counts = torch.bincount(torch.tensor(exits)[:, 0], minlength=max_loops)
    assert not counts[:min_loops].any()
    assert len(counts) == max_loops
    if max_loops - min_loops > 1:
        assert stats.chisquare(counts[min_loops:]).pvalue > 1e-3


def test_student_exits_are_a_function_of_seed_and_step() -> None:
    first = [ILSD(6).student_exits(1, step) for step in range(200)]
    torch.manual_seed(99)
    assert [ILSD(6).student_exits(1, step) for step in reversed(range(200))][::-1] == first
    assert [ILSD(6).student_exits(2, step) for step in range(200)] != first


def test_exits_of_the_modes_without_a_random_student() -> None:
    assert ILSD(4, mode="vanilla").student_exits(0, 1) == ()
    assert ILSD(1).student_exits(0, 1) == ()
    assert ILSD(5, min_loops=2, mode="deep_supervision").student_exits(0, 1) == (2, 3, 4)


@pytest.mark.parametrize(("min_loops", "max_loops"), [(0, 4), (4, 4), (5, 4), (1, 0), (2, 2), (-1, 1), (2, 1)])
def test_bad_loop_ranges_are_refused(min_loops: int, max_loops: int) -> None:
    with pytest.raises(ValueError, match="min_loops"):
        ILSD(max_loops, min_loops)


def small_network() -> LoopedMaskedTransformer:
    return LoopedMaskedTransformer(V, (2, 3), 4, num_layers=2, width=16, num_heads=2)


@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_is_one_forward_pass_and_logs_its_terms(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    network, distillation, sampler = small_network(), ILSD(4, mode=mode), partial(MaskGITSampler, steps=2)
    process = MaskingProcess(V)
    module = ELTModule(
        network, process, MaskedObjective, distillation, sampler, num_classes=4, class_dropout_prob=0.5, seed=13
    )
    logged: dict[str, float] = {}
    monkeypatch.setattr(ELTModule, "global_step", 30)
    monkeypatch.setattr(ELTModule, "total_steps", 40)
    monkeypatch.setattr(module, "log_dict", lambda terms, **_: logged.update(terms))
    block_calls: list[int] = []
    head_calls: list[int] = []
    for block in (m for m in network.modules() if isinstance(m, Block)):
        block.register_forward_hook(lambda *_: block_calls.append(1))
    network.head_dense.register_forward_hook(lambda *_: head_calls.append(1))

    batch = Batch(torch.randint(0, V, (B, T)), torch.randint(0, 4, (B,)), torch.tensor([3, 99, 4, 70, 12]))
    loss = module.training_step(batch, 0)
    exits = distillation.student_exits(13, 30)
    assert len(block_calls) == 2 * 4
    assert len(head_calls) == 1 + len(exits)
    seeds = sample_seeds(13, batch.indices)
    corrupted = module.objective.corrupt(batch.x, seeds, 30)
    labels = drop_labels(batch.labels, seeds, 30, 0.5, 4)
    logits = {n: network(corrupted.inputs, Condition(labels), n).predictions[n].detach() for n in (*exits, 4)}
    assert loss.item() == pytest.approx(loss_by_hand(mode, logits, 4, corrupted, 0.1, 0.75), rel=1e-5)
    names = {"train/loss", "train/loss_teacher"}
    if exits:
        names |= {"train/lambda", "train/student_loops"}
        names |= {"train/loss_student"} if mode != "distillation" else set()
        names |= {"train/loss_distill"} if mode in ("ilsd", "distillation") else set()
    assert set(logged) == names

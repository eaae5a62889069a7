import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.masking import MaskingProcess, cosine_mask_ratio, num_still_masked, random_mask, ranks
from elt_lightning.processes.noise import Stream, batch_seed, sample_seeds, uniform

V, T = 9, 25


def random_tokens(batch: int, tokens: int = T) -> Tensor:
    return torch.randint(0, V, (batch, tokens))


@pytest.mark.parametrize("seed", range(3))
def test_the_number_hidden_is_the_ceiling_of_the_cosine(seed: int) -> None:
    seeds = sample_seeds(seed, torch.arange(600))
    corrupted = MaskedObjective(MaskingProcess(V)).corrupt(random_tokens(600), seeds, 4)
    hidden = (corrupted.inputs == V).sum(1).tolist()
    progress = uniform(seeds, 4, Stream.MASK_RATIO).tolist()
    for count, r in zip(hidden, progress, strict=True):
        exact = T * math.cos(math.pi / 2 * r)
        # Within rounding of a whole number either neighbour is right.
        assert count == math.ceil(exact) or abs(exact - round(exact)) < 1e-5
    assert min(hidden) >= 1
    assert len(set(hidden)) > 15


def test_the_number_hidden_is_distributed_as_the_cosine_of_a_uniform() -> None:
    corrupted = MaskedObjective(MaskingProcess(V)).corrupt(random_tokens(8000), sample_seeds(2, torch.arange(8000)), 0)
    counts = torch.bincount(corrupted.weight.sum(1).long(), minlength=T + 1)
    # P(count = m) = P((m - 1)/T < cos(π/2·r) <= m/T) for r uniform.
    below = [1 - 2 / math.pi * math.acos(m / T) for m in range(T + 1)]
    expected = [8000 * (high - low) for low, high in itertools.pairwise(below)]
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], expected).pvalue > 1e-3


def test_hidden_positions_are_uniform_over_the_grid() -> None:
    corrupted = MaskedObjective(MaskingProcess(V)).corrupt(random_tokens(6000), sample_seeds(3, torch.arange(6000)), 1)
    singles = corrupted.weight[corrupted.weight.sum(1) == 3]
    assert stats.chisquare(singles.sum(0)).pvalue > 1e-3


@pytest.mark.parametrize("ratio", [0.0, 1e-6, 0.04, 0.5, 0.999, 1.0])
def test_random_mask_hides_the_lowest_scores_and_at_least_one(ratio: float) -> None:
    scores = torch.rand(7, 13)
    masked = random_mask(torch.full((7,), ratio), scores)
    count = max(1, math.ceil(ratio * 13 - 1e-6))
    assert masked.sum(1).tolist() == [count] * 7
    for row, chosen in zip(scores, masked, strict=True):
        assert sorted(row[chosen].tolist()) == sorted(row.tolist())[:count]


def test_cosine_mask_ratio_at_its_ends_and_middle() -> None:
    ratio = cosine_mask_ratio(torch.tensor([0.0, 1 / 3, 0.5, 2 / 3, 1.0]))
    torch.testing.assert_close(
        ratio, torch.tensor([1.0, math.sqrt(3) / 2, math.sqrt(0.5), 0.5, 0.0]), atol=1e-6, rtol=0
    )


def test_ranks_are_places_in_ascending_order_with_ties_kept_in_order() -> None:
    scores = torch.rand(20, 11)
    for row, places in zip(scores.tolist(), ranks(scores).tolist(), strict=True):
        assert places == [sorted(row).index(value) for value in row]
    assert ranks(torch.tensor([[1.0, 1.0, 0.0, 1.0]])).tolist() == [[1, 2, 0, 3]]


def test_corruption_leaves_seen_tokens_and_the_truth() -> None:
    x = random_tokens(50)
    before = x.clone()
    corrupted = MaskedObjective(MaskingProcess(V)).corrupt(x, sample_seeds(0, torch.arange(50)), 0)
    assert torch.equal(x, before)
    assert torch.equal(corrupted.target, before)
    seen = corrupted.weight == 0
    assert torch.equal(corrupted.inputs[seen], x[seen])
    assert (corrupted.inputs[~seen] == V).all()
    assert corrupted.time is None


@pytest.mark.parametrize("ratio_per", ["sample", "batch"])
def test_what_is_hidden_does_not_depend_on_the_batch(ratio_per: str) -> None:
    objective = MaskedObjective(MaskingProcess(V), ratio_per=ratio_per)
    x, seeds = random_tokens(30), sample_seeds(6, torch.randint(0, 2**32, (30,)))
    together = objective.corrupt(x, seeds, 11).inputs
    order = torch.randperm(30)
    assert torch.equal(objective.corrupt(x[order], seeds[order], 11).inputs, together[order])
    for size in (1, 7):
        parts = [objective.corrupt(a, s, 11).inputs for a, s in zip(x.split(size), seeds.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), together)
    assert not torch.equal(objective.corrupt(x, seeds, 12).inputs, together)


def test_one_ratio_per_batch_hides_equally_many_in_every_sample_at_different_places() -> None:
    objective, seeds = MaskedObjective(MaskingProcess(V), ratio_per="batch"), sample_seeds(8, torch.arange(40))
    counts = set()
    for step in range(30):
        weight = objective.corrupt(random_tokens(40), seeds, step).weight
        assert len(weight.sum(1).unique()) == 1
        r = uniform(batch_seed(seeds), step, Stream.MASK_RATIO).item()
        assert weight[0].sum() == math.ceil(T * math.cos(math.pi / 2 * r))
        assert len(weight.unique(dim=0)) > 1 or weight[0].sum() in (T,)
        counts.add(int(weight[0].sum()))
    assert len(counts) > 5


def cross_entropy_by_hand(logits: list[float], target: list[float]) -> float:
    normaliser = math.log(math.fsum(math.exp(value) for value in logits))
    return -math.fsum(share * (value - normaliser) for share, value in zip(target, logits, strict=True))


@pytest.mark.parametrize("loss_on", ["masked", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_losses_are_means_over_the_positions_that_count(loss_on: str, smoothing: float, seed: int) -> None:
    torch.manual_seed(seed)
    objective = MaskedObjective(MaskingProcess(V), label_smoothing=smoothing, loss_on=loss_on)
    x = random_tokens(6, 8)
    corrupted = objective.corrupt(x, sample_seeds(seed, torch.arange(6)), 2)
    prediction, teacher = 4 * torch.randn(6, 8, V), 4 * torch.randn(6, 8, V)
    truth = objective.ground_truth(prediction, corrupted)
    taught = objective.distillation(prediction, teacher, corrupted)
    assert truth.shape == taught.shape == (6,)
    for b in range(6):
        positions = [i for i in range(8) if loss_on == "all" or corrupted.inputs[b, i] == V]
        by_data, by_teacher = [], []
        for i in positions:
            logits = prediction[b, i].double().tolist()
            smooth = [(1 - smoothing) * (v == x[b, i]) + smoothing / V for v in range(V)]
            by_data.append(cross_entropy_by_hand(logits, smooth))
            exponentials = [math.exp(value) for value in teacher[b, i].double().tolist()]
            by_teacher.append(cross_entropy_by_hand(logits, [e / sum(exponentials) for e in exponentials]))
        assert truth[b].item() == pytest.approx(sum(by_data) / len(positions), rel=2e-6)
        assert taught[b].item() == pytest.approx(sum(by_teacher) / len(positions), rel=2e-6)


def test_label_smoothing_leaves_distillation_alone() -> None:
    x, seeds = random_tokens(4), sample_seeds(0, torch.arange(4))
    student, teacher = torch.randn(4, T, V), torch.randn(4, T, V)
    plain, smooth = (
        MaskedObjective(MaskingProcess(V), label_smoothing=0.0),
        MaskedObjective(MaskingProcess(V), label_smoothing=0.4),
    )
    corrupted = plain.corrupt(x, seeds, 0)
    assert torch.equal(
        plain.distillation(student, teacher, corrupted), smooth.distillation(student, teacher, corrupted)
    )
    assert not torch.equal(plain.ground_truth(student, corrupted), smooth.ground_truth(student, corrupted))


def test_seen_positions_do_not_move_the_loss_on_masked_ones() -> None:
    objective = MaskedObjective(MaskingProcess(V))
    corrupted = objective.corrupt(random_tokens(5), sample_seeds(0, torch.arange(5)), 3)
    prediction = torch.randn(5, T, V, requires_grad=True)
    gradient = torch.autograd.grad(objective.ground_truth(prediction, corrupted).sum(), prediction)[0]
    assert not gradient[corrupted.weight == 0].any()
    assert (gradient[corrupted.weight == 1].abs().sum(-1) > 0).all()


def test_half_precision_logits_are_scored_in_float32() -> None:
    objective = MaskedObjective(MaskingProcess(V))
    corrupted = objective.corrupt(random_tokens(5), sample_seeds(0, torch.arange(5)), 3)
    half = (8 * torch.randn(5, T, V)).bfloat16()
    assert torch.equal(objective.ground_truth(half, corrupted), objective.ground_truth(half.float(), corrupted))
    assert torch.equal(
        objective.distillation(half, half, corrupted), objective.distillation(half.float(), half.float(), corrupted)
    )


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_impossible_label_smoothing_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        MaskedObjective(MaskingProcess(V), label_smoothing=smoothing)


@pytest.mark.parametrize("steps", [1, 2, 12, 24])
def test_number_still_masked_equals_the_formula(steps: int) -> None:
    unknown = torch.arange(0, 300, 7)
    for step in range(steps):
        masked = (torch.rand(len(unknown)) * (unknown + 1)).long().clamp(max=unknown)
        ours = num_still_masked(unknown, masked, step, steps).tolist()
        for total, now, count in zip(unknown.tolist(), masked.tolist(), ours, strict=True):
            if step == steps - 1 or now == 0:
                assert count == 0
                continue
            exact = total * math.cos(math.pi / 2 * (step + 1) / steps)
            floors = {math.floor(exact), math.floor(exact + 1e-4), math.floor(exact - 1e-4)}
            assert count in {max(1, min(now - 1, floor)) for floor in floors}

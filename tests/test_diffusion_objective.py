import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from scipy import stats
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.objectives import diffusion as diffusion_objective
from elt_lightning.objectives.base import Corrupted
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.flow_matching import FlowMatchingObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import (
    GaussianProcess,
    Prediction,
    ShiftedCosine,
    StraightPath,
    add_noise,
    clean_and_noise,
    predicted,
    sigmoid_weight,
)
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import Stream, normal, sample_seeds

PREDICTIONS: tuple[Prediction, ...] = ("x", "v", "epsilon")
SHAPE = (2, 4, 6)


def random_schedule() -> ShiftedCosine:
    lowest, highest, log_shift = (torch.rand(3) * torch.tensor([12, 12, 2])).tolist()
    return ShiftedCosine(shift=math.exp(log_shift - 1), lowest=-6 - lowest, highest=6 + highest)


def random_seeds(count: int) -> Tensor:
    return sample_seeds(int(torch.randint(2**31, ())), torch.arange(count))


def no_labels(time: Tensor) -> Condition:
    return Condition(torch.zeros(len(time), dtype=torch.long), time)


# --- normal noise ----------------------------------------------------------------------------------------------------


def test_normal_noise_is_normal_and_uncorrelated() -> None:
    noise = normal(random_seeds(400), 3, Stream.NOISE, (501,)).double()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(float((noise**4).mean()) - 3) < 0.1  # its spread over draws is √96/√200,400 = 0.02
    correlations = torch.corrcoef(torch.cat([noise[:, :2], noise[:, 251:253]], dim=1).T)  # 0 and 251 are one pair
    assert (correlations - torch.eye(4)).abs().max() < 0.25
    squares = torch.corrcoef(torch.stack([noise[:, :250].flatten() ** 2, noise[:, 251:].flatten() ** 2]))
    assert abs(float(squares[0, 1])) < 0.02


def test_normal_noise_depends_on_seed_step_and_stream_alone() -> None:
    seeds = random_seeds(7)
    for shape in ((), (1,), (2,), (3, 5), (2, 8, 8)):
        together = normal(seeds, 5, Stream.NOISE, shape)
        assert together.shape == (7, *shape)
        assert together.isfinite().all()
        for i in range(7):
            assert torch.equal(together[i : i + 1], normal(seeds[i : i + 1], 5, Stream.NOISE, shape))
    first = normal(seeds, 5, Stream.NOISE, (64,))
    for other in (
        normal(seeds, 6, Stream.NOISE, (64,)),
        normal(seeds, 5, Stream.SAMPLER_NOISE, (64,)),
        normal(random_seeds(7), 5, Stream.NOISE, (64,)),
    ):
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.25


# --- schedules -------------------------------------------------------------------------------------------------------


def test_shifted_cosine_against_the_textbook_formula() -> None:
    schedule = random_schedule()
    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    t_min, t_max = math.atan(math.exp(-schedule.highest / 2)), math.atan(math.exp(-schedule.lowest / 2))
    expected = -2 * torch.log(torch.tan(t_min + time * (t_max - t_min))) + 2 * math.log(schedule.shift)
    torch.testing.assert_close(schedule.logsnr(time), expected, rtol=1e-9, atol=1e-9)
    ends = torch.tensor([schedule.highest, schedule.lowest], dtype=torch.float64) + 2 * math.log(schedule.shift)
    torch.testing.assert_close(schedule.logsnr(torch.tensor([0.0, 1.0]).double()), ends)
    torch.testing.assert_close(schedule.logsnr(torch.tensor([0.0, 1.0])), ends.float())  # to float32's last digits


def test_the_slope_is_the_derivative() -> None:
    schedule = random_schedule()
    time = torch.rand(50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.logsnr(time).sum(), time)
    torch.testing.assert_close(schedule.logsnr_slope(time.detach()), slope)
    assert (slope < 0).all()


@pytest.mark.parametrize("make", [random_schedule, StraightPath])
def test_amounts_have_the_signal_to_noise_ratio(make: Callable[[], ShiftedCosine | StraightPath]) -> None:
    schedule, time = make(), torch.rand(50, dtype=torch.float64) * 0.98 + 0.01
    logsnr = schedule.logsnr(time)
    a, s = schedule.amounts(logsnr)
    torch.testing.assert_close(torch.log(a**2 / s**2), logsnr)
    if isinstance(schedule, ShiftedCosine):
        torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))
    else:
        margin = 1 / (1 + math.exp(7.5))
        torch.testing.assert_close((a, s), (1 - margin - time * (1 - 2 * margin), margin + time * (1 - 2 * margin)))


@pytest.mark.parametrize("schedule", [ShiftedCosine(), ShiftedCosine(0.25), StraightPath()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedules_are_finite_at_both_ends(schedule: ShiftedCosine | StraightPath, dtype: torch.dtype) -> None:
    time = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24, 1.0]).to(dtype)
    logsnr = schedule.logsnr(time)
    a, s = schedule.amounts(logsnr.to(dtype))
    for values in (logsnr, a, s, a.log(), s.log()):
        assert values.isfinite().all()
        assert values.dtype == torch.float32
    assert (logsnr.diff()[time.diff() > 0] < 0).all()


@pytest.mark.parametrize("settings", [{"shift": 0.0}, {"shift": -1.0}, {"lowest": 3.0, "highest": 3.0}])
def test_impossible_schedules_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shift"):
        ShiftedCosine(**settings)
    with pytest.raises(ValueError, match="limit"):
        StraightPath(limit=0.0)


# --- x, v and ε ------------------------------------------------------------------------------------------------------


def random_mixture() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    clean, noise = torch.randn(5, *SHAPE).double(), torch.randn(5, *SHAPE).double()
    schedule = random_schedule()
    a, s = schedule.amounts(schedule.logsnr(torch.rand(5, dtype=torch.float64)))
    return clean, noise, a, s, add_noise(clean, noise, a, s)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_true_prediction_gives_back_data_and_noise(kind: Prediction) -> None:
    clean, noise, a, s, noisy = random_mixture()
    value = predicted(kind, clean, noise, a, s)
    torch.testing.assert_close(clean_and_noise(kind, value, noisy, a, s), (clean, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "other"), list(product(PREDICTIONS, PREDICTIONS)))
def test_round_trips_of_wrong_predictions(kind: Prediction, other: Prediction) -> None:
    _, _, a, s, noisy = random_mixture()
    value = torch.randn(5, *SHAPE).double()  # what a network says need not be true
    clean, noise = clean_and_noise(kind, value, noisy, a, s)
    torch.testing.assert_close(add_noise(clean, noise, a, s), noisy)
    turned = predicted(other, clean, noise, a, s)
    again = predicted(kind, *clean_and_noise(other, turned, noisy, a, s), a, s)
    torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-6)


def test_weights_of_x_v_and_epsilon_agree() -> None:
    _, _, a, s, noisy = random_mixture()
    logsnr, slope, bias = torch.log(a**2 / s**2), -torch.rand(5).double() * 9, float(torch.randn(()))
    losses = {}
    one, two = torch.randn(5, *SHAPE).double(), torch.randn(5, *SHAPE).double()  # two predictions of v
    pairs = [clean_and_noise("v", value, noisy, a, s) for value in (one, two)]
    for kind in PREDICTIONS:
        first, second = (predicted(kind, *pair, a, s) for pair in pairs)
        error = (first - second).square().flatten(1).sum(1)
        losses[kind] = sigmoid_weight(kind, logsnr, slope, bias) * error
    torch.testing.assert_close(losses["x"], losses["v"], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["x"], losses["epsilon"], rtol=1e-6, atol=0)
    # The published form of each.
    published = -slope * math.exp(bias) / (1 + torch.exp(bias - logsnr))
    torch.testing.assert_close(sigmoid_weight("x", logsnr, slope, bias), published)
    torch.testing.assert_close(sigmoid_weight("v", logsnr, slope, bias), published * s**2)
    published = -slope / (1 + torch.exp(logsnr - bias))
    torch.testing.assert_close(sigmoid_weight("epsilon", logsnr, slope, bias), published)


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [DiffusionObjective(GaussianProcess("v")), FlowMatchingObjective(GaussianProcess("velocity"))]
)
def test_corruption_depends_on_seed_and_step_alone(objective: DiffusionObjective | FlowMatchingObjective) -> None:
    x, seeds = torch.randn(6, *SHAPE), random_seeds(6)
    together = objective.corrupt(x, seeds, 11)
    for i in range(6):
        alone = objective.corrupt(x[i : i + 1], seeds[i : i + 1], 11)
        for name in ("inputs", "target", "weight", "time"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])
    assert not torch.equal(objective.corrupt(x, seeds, 12).time, together.time)


@pytest.mark.parametrize(
    "objective", [DiffusionObjective(GaussianProcess("epsilon")), FlowMatchingObjective(GaussianProcess("velocity"))]
)
def test_times_and_noise_have_nothing_in_common(objective: DiffusionObjective | FlowMatchingObjective) -> None:
    corrupted = objective.corrupt(torch.zeros(4000, *SHAPE), random_seeds(4000), 3)  # of no data the target is ε
    noise = corrupted.target.flatten(1)
    both = torch.cat([corrupted.time[:, None], noise, noise**2], dim=1)
    assert torch.corrcoef(both.T)[0, 1:].abs().max() < 5 / math.sqrt(4000)


def test_times_are_uniform_and_inputs_have_the_right_amounts() -> None:
    schedule = ShiftedCosine(shift=0.5)
    objective = DiffusionObjective(GaussianProcess("epsilon", schedule))
    x = torch.randn(1, *SHAPE).expand(4000, *SHAPE)
    corrupted = objective.corrupt(x, random_seeds(4000), 0)
    time = corrupted.time
    assert stats.kstest(time.numpy(), "uniform").pvalue > 1e-4
    angle = math.atan(math.exp(-7.5)) + time.double() * (math.pi / 2 - 2 * math.atan(math.exp(-7.5)))
    ratio = angle.tan() / 0.5  # s/a
    a, s = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    noise = (corrupted.inputs.double() - a.view(-1, 1, 1, 1) * x) / s.view(-1, 1, 1, 1)
    low = s > 0.05  # where noise can be read off in float32
    torch.testing.assert_close(corrupted.target[low].double(), noise[low], rtol=0, atol=1e-4)
    assert stats.kstest(corrupted.target.flatten().numpy(), "norm").pvalue > 1e-4


def x_space_ilsd(
    kind: Prediction,
    objective: DiffusionObjective,
    corrupted: Corrupted,
    x: Tensor,
    outputs: dict[int, Tensor],
    λ: float,
) -> Tensor:
    """Algorithm 1 of the paper on x̂ in float64, with the weights of formats.md; shares nothing but the schedule."""
    time = corrupted.time.double().requires_grad_()
    logsnr = objective.schedule.logsnr(time)
    (slope,) = torch.autograd.grad(logsnr.sum(), time)
    logsnr = logsnr.detach()
    bias = objective.weight_bias
    weight = -slope * math.exp(bias) * torch.sigmoid(logsnr - bias)
    a, s = torch.sigmoid(logsnr).sqrt().view(-1, 1, 1, 1), torch.sigmoid(-logsnr).sqrt().view(-1, 1, 1, 1)
    z = corrupted.inputs.double()

    def clean(output: Tensor) -> Tensor:
        output = output.double()
        return {"x": output, "v": a * z - s * output, "epsilon": (z - s * output) / a}[kind]

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return (weight * (one - other).square().mean(dim=(1, 2, 3))).mean()

    student, teacher = (clean(outputs[loops]) for loops in sorted(outputs))
    return loss(teacher, x) + λ * loss(student, x) + (1 - λ) * loss(student, teacher.detach())


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ilsd_in_x_space_is_the_papers_formula(kind: Prediction) -> None:
    objective = DiffusionObjective(GaussianProcess(kind, ShiftedCosine(0.5)), weight_bias=1.5)
    x = torch.randn(64, *SHAPE)
    corrupted = objective.corrupt(x, random_seeds(64), 4)
    # Outputs near the truth, as the last digit of x̂ is all that is left of v or ε at the ends of time.
    outputs = {r: (corrupted.target + 0.5 * torch.randn_like(x)).requires_grad_() for r in (2, 4)}
    loss, terms = ILSD(max_loops=4).loss(outputs, corrupted, objective, progress=0.3)
    # In float64 from float32's z, the x̂ of the true v or ε is x but for rounding; where σ or α is small, that shows.
    expected = x_space_ilsd(kind, objective, corrupted, x.double(), outputs, λ=0.7)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    grads = torch.autograd.grad(loss, list(outputs.values()))
    expected_grads = torch.autograd.grad(expected, list(outputs.values()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() < 2e-3 * expected_grad.norm()
    assert terms["lambda"] == pytest.approx(0.7)


def test_the_same_denoiser_has_the_same_loss_whatever_it_predicts() -> None:
    x, seeds = torch.randn(32, *SHAPE), random_seeds(32)
    error = torch.randn(32, *SHAPE)
    losses = []
    for kind in PREDICTIONS:
        objective = DiffusionObjective(GaussianProcess(kind))
        corrupted = objective.corrupt(x, seeds, 9)
        a, s = objective.schedule.amounts(objective.schedule.logsnr(corrupted.time))
        slope = {"x": torch.ones_like(a), "v": -s, "epsilon": -s / a}[kind].view(-1, 1, 1, 1)  # d x̂ / d prediction
        scale = torch.minimum(s, a).view(-1, 1, 1, 1)  # an error of x̂ that each of the three can express
        losses.append(objective.ground_truth(corrupted.target + scale * error / slope, corrupted))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-3, atol=0)


def test_the_teacher_gets_no_gradient_from_the_student() -> None:
    for objective in (DiffusionObjective(GaussianProcess("v")), FlowMatchingObjective(GaussianProcess("velocity"))):
        corrupted = objective.corrupt(torch.randn(3, *SHAPE), random_seeds(3), 0)
        student, teacher = (torch.randn(3, *SHAPE, requires_grad=True) for _ in range(2))
        objective.distillation(student, teacher, corrupted).sum().backward()
        assert teacher.grad is None
        assert student.grad is not None
        assert (student.grad != 0).all()


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [0.0, 2**-24, 1 - 2**-24, 1.0])
def test_losses_and_denoised_are_finite_at_the_ends_of_time(
    kind: Prediction, dtype: torch.dtype, time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion_objective, "uniform", lambda seeds, *_: torch.full((len(seeds),), time))
    objective = DiffusionObjective(GaussianProcess(kind))
    x = torch.randn(8, *SHAPE).to(dtype)
    corrupted = objective.corrupt(x, random_seeds(8), 0)
    student, teacher = (torch.randn(8, *SHAPE).to(dtype).requires_grad_() for _ in range(2))
    loss = objective.ground_truth(student, corrupted) + objective.distillation(student, teacher, corrupted)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        denoised = objective.process.denoised(student.detach(), corrupted.inputs, no_labels(corrupted.time))
    assert denoised.isfinite().all()
    assert denoised.dtype == torch.float32
    perfect = objective.ground_truth(corrupted.target.to(dtype), corrupted)
    assert (perfect < 1e-3 * objective.ground_truth(student, corrupted).mean()).all()


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_denoised_of_the_target_is_the_data(kind: Prediction) -> None:
    objective = DiffusionObjective(GaussianProcess(kind, random_schedule()))
    x = torch.randn(200, *SHAPE)
    corrupted = objective.corrupt(x, random_seeds(200), 1)
    denoised = objective.process.denoised(corrupted.target, corrupted.inputs, no_labels(corrupted.time))
    usable = corrupted.time < 0.95  # ε at nearly pure noise says nothing about x in float32
    torch.testing.assert_close(denoised[usable], x[usable], rtol=0, atol=1e-4)


def test_masked_logits_pass_through_denoised() -> None:
    logits = torch.randn(2, 5, 3)
    assert MaskingProcess(3).denoised(logits, torch.zeros(2, 5), no_labels(torch.rand(2))) is logits


# --- flow matching ---------------------------------------------------------------------------------------------------


def test_flow_matching_times_are_logit_normal_and_the_velocity_leads_home() -> None:
    objective = FlowMatchingObjective(GaussianProcess("velocity"), time_mean=0.4, time_std=0.8)
    x = torch.randn(4000, *SHAPE)
    corrupted = objective.corrupt(x, random_seeds(4000), 2)
    time = corrupted.time.double()
    logits = torch.log(time / (1 - time))
    assert stats.kstest(logits.numpy(), "norm", args=(0.4, 0.8)).pvalue > 1e-4
    # dz/dt along the path is the target, and both of its ends are the ones it names.
    margin = 1 / (1 + math.exp(7.5))  # the path begins and ends this short of its ends
    t = (margin + time * (1 - 2 * margin)).view(-1, 1, 1, 1)
    torch.testing.assert_close(corrupted.inputs.double() - t * corrupted.target.double(), x.double(), rtol=0, atol=1e-5)
    assert (
        stats.kstest((corrupted.inputs.double() + (1 - t) * corrupted.target).flatten().numpy(), "norm").pvalue > 1e-4
    )
    denoised = objective.process.denoised(corrupted.target, corrupted.inputs, no_labels(corrupted.time))
    torch.testing.assert_close(denoised, x, rtol=0, atol=1e-5)


def test_flow_matching_losses_are_mean_squares() -> None:
    objective = FlowMatchingObjective(GaussianProcess("velocity"))
    corrupted = objective.corrupt(torch.randn(3, *SHAPE), random_seeds(3), 0)
    student, teacher = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    for i, loss in enumerate(objective.ground_truth(student, corrupted).tolist()):
        assert loss == pytest.approx(float(((student - corrupted.target)[i] ** 2).mean()), rel=1e-5)
    for i, loss in enumerate(objective.distillation(student, teacher, corrupted).tolist()):
        assert loss == pytest.approx(float(((student - teacher)[i] ** 2).mean()), rel=1e-5)


def test_impossible_objectives_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction"):
        GaussianProcess("noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time_std"):
        FlowMatchingObjective(GaussianProcess("velocity"), time_std=0.0)


@pytest.mark.parametrize("kind", [DiffusionObjective, FlowMatchingObjective])
def test_a_variance_that_the_objective_has_no_use_for_is_refused(kind: type) -> None:
    """One channel would be compared with two by broadcasting."""
    objective = kind(GaussianProcess("velocity" if kind is FlowMatchingObjective else "v"))
    corrupted = objective.corrupt(torch.randn(3, 1, 4, 4), random_seeds(3), 0)
    with pytest.raises(UserError, match=r"of shape \(1, 4, 4\), not \(2, 4, 4\): leave the network's out_channels out"):
        objective.ground_truth(torch.randn(3, 2, 4, 4), corrupted)

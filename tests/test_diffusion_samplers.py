"""For Gaussian data the best denoiser is known, every sampler is linear, and so each sample's distribution is exact.

Data: mean m and variance σ² in every element. Letters as in the sampler's file.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from predictions import stateless
from torch import Tensor

from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import (
    GaussianProcess,
    NoiseSchedule,
    Prediction,
    ShiftedCosine,
    StraightPath,
    predicted,
)
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import Stream, normal, sample_seeds
from elt_lightning.samplers.diffusion import DDIMSampler, DDPMSampler, DiffusionSampler, DPMSolverSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler

NUM_CLASSES = 3
MEAN, VARIANCE = 0.7, 0.3
SCHEDULES = [ShiftedCosine(), ShiftedCosine(0.5), StraightPath()]
MAKERS: list[Callable[..., DiffusionSampler]] = [DDPMSampler, DDIMSampler, DPMSolverSampler]


def of(schedule: NoiseSchedule | None = None) -> GaussianProcess:
    return GaussianProcess("velocity" if isinstance(schedule, StraightPath) else "v", schedule)


def amounts(schedule: NoiseSchedule, time: float) -> tuple[float, float]:
    a, s = schedule.amounts(schedule.logsnr(torch.tensor(time, dtype=torch.float64)))
    return float(a), float(s)


def gaussian_denoiser(schedule: NoiseSchedule, mean: float = MEAN, variance: float = VARIANCE) -> Callable[..., Tensor]:
    """E[x | z]: m + a·σ²/(a²·σ² + s²)·(z − a·m)."""

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        assert condition.time is not None
        a, s = (v.view(-1, *[1] * (x.ndim - 1)) for v in schedule.amounts(schedule.logsnr(condition.time)))
        return mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)

    return predict


def labels_of(count: int) -> Condition:
    return Condition(torch.zeros(count, dtype=torch.long))


def draw(sampler: DiffusionSampler, count: int = 500, elements: int = 400, **settings: object) -> Tensor:
    predict = settings.pop("predict", None) or gaussian_denoiser(sampler.schedule)
    seeds = sample_seeds(int(torch.randint(2**31, ())), torch.arange(count))
    return sampler.sample(stateless(predict), (elements,), labels_of(count), 1, seeds, **settings)  # type: ignore[arg-type]


# --- exactness -------------------------------------------------------------------------------------------------------


def moments(sampler: DiffusionSampler, start_mean: float = 0.0, start_variance: float = 1.0) -> tuple[float, float]:
    """Mean and variance of the samples in closed form, from each method's own published equations."""
    schedule, steps = sampler.schedule, sampler.steps
    times = [1 - k / steps for k in range(steps)]
    mean = numbers(start_mean, 0)  # of (z, x̂ of the step before)
    covariance = torch.diag(numbers(start_variance, 0))
    for k, t in enumerate(times):
        a, s = amounts(schedule, t)
        gain = a * VARIANCE / (a**2 * VARIANCE + s**2)
        clean, offset = numbers(gain, 0), MEAN * (1 - gain * a)  # x̂ = gain·z + offset
        if k == steps - 1:
            return float(clean @ mean) + offset, float(clean @ covariance @ clean)
        b, u = amounts(schedule, times[k + 1])
        noise = 0.0
        if isinstance(sampler, DDPMSampler):
            # p(z_u | z_t, x) by Bayes: a Gaussian prior N(b·x, u²) and a likelihood of variance s² − (a/b)²·u².
            step_variance = s**2 - (a / b) ** 2 * u**2
            precision = 1 / u**2 + (a / b) ** 2 / step_variance
            row = (clean * b / u**2 + numbers(a / b / step_variance, 0)) / precision
            shift = offset * b / u**2 / precision
            γ = sampler.variance_interpolation
            noise = math.exp(γ * math.log(step_variance) + (1 - γ) * math.log(1 / precision))
        else:
            row, shift = clean, offset
            if isinstance(sampler, DPMSolverSampler) and k > 0:
                # The line through the last two x̂ over λ, at the middle of the step.
                λ = [math.log(x / y) for x, y in (amounts(schedule, times[k - 1]), (a, s), (b, u))]
                ahead = (λ[2] - λ[1]) / 2 / (λ[1] - λ[0])
                row, shift = clean * (1 + ahead) - numbers(0, ahead), offset * (1 + ahead)
            drift = u * (b / u - a / s)  # u·∫ e^λ dλ over the step
            row, shift = drift * row + numbers(u / s, 0), drift * shift
        matrix = torch.stack([row, clean])
        mean = matrix @ mean + numbers(shift, offset)
        covariance = matrix @ covariance @ matrix.T
        covariance[0, 0] += noise
    raise AssertionError


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_samples_have_the_moments_of_the_recursion(
    make: Callable[..., DiffusionSampler], schedule: NoiseSchedule, steps: int
) -> None:
    sampler = make(of(schedule), NUM_CLASSES, steps)
    samples = draw(sampler).double()
    mean, variance = moments(sampler)
    # Within 4.5 standard errors of 200,000 draws.
    assert abs(float(samples.mean()) - mean) < 4.5 * math.sqrt(variance / samples.numel()) + 1e-6
    assert abs(float(samples.var()) / variance - 1) < 4.5 * math.sqrt(2 / samples.numel()) + 1e-4


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_ancestral_variances_at_both_ends_of_the_interpolation(gamma: float) -> None:
    sampler = DDPMSampler(of(), NUM_CLASSES, 6, variance_interpolation=gamma)
    samples = draw(sampler).double()
    mean, variance = moments(sampler)
    assert abs(float(samples.mean()) - mean) < 4.5 * math.sqrt(variance / samples.numel())
    assert abs(float(samples.var()) / variance - 1) < 4.5 * math.sqrt(2 / samples.numel())


ORDERS = [(DDPMSampler, 1), (DDIMSampler, 1), (DPMSolverSampler, 2)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("make", "order"), ORDERS)
def test_the_recursion_tends_to_the_data_at_the_samplers_order(
    make: Callable[..., DiffusionSampler], order: int, schedule: NoiseSchedule
) -> None:
    (first_a, first_s), (a, s) = amounts(schedule, 1.0), amounts(schedule, 0.0)
    start = first_a * MEAN, first_a**2 * VARIANCE + first_s**2  # of the data's own z at time 1
    limit = math.sqrt(VARIANCE * a**2 * VARIANCE / (a**2 * VARIANCE + s**2))  # of x̂ at time 0, which is the data's
    assert limit == pytest.approx(math.sqrt(VARIANCE), rel=1e-5)
    errors = []
    for steps in (512, 1024, 2048):  # as many as it takes to resolve logsnr near the ends of time
        mean, variance = moments(make(of(schedule), NUM_CLASSES, steps), *start)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        errors.append(abs(math.sqrt(variance) - limit))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("schedule", [ShiftedCosine(), ShiftedCosine(0.5)])
@pytest.mark.parametrize(("make", "order"), ORDERS)
def test_samples_have_the_datas_moments_at_the_steps_people_use(
    make: Callable[..., DiffusionSampler], order: int, schedule: NoiseSchedule
) -> None:
    for steps, tolerance in {1: [(512, 1e-2)], 2: [(24, 1e-2), (512, 5e-4)]}[order]:
        mean, variance = moments(make(of(schedule), NUM_CLASSES, steps))
        assert math.sqrt(variance) == pytest.approx(math.sqrt(VARIANCE), rel=tolerance)
        # Starting from N(0, 1) in place of the data's own z at time 1 leaves a trace of a = 5·10⁻⁴ in the mean.
        assert mean == pytest.approx(MEAN, abs=5e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("make", "order"), [(DDIMSampler, 1), (DPMSolverSampler, 2)])
def test_each_sample_tends_to_the_end_of_its_path_at_the_samplers_order(
    make: Callable[..., DiffusionSampler], order: int, schedule: NoiseSchedule
) -> None:
    """The probability flow keeps (z − a·m)/√(a²·σ² + s²), so where each starting noise ends is known."""
    seeds = sample_seeds(5, torch.arange(4))
    (first_a, first_s), (a, s) = amounts(schedule, 1.0), amounts(schedule, 0.0)
    start = normal(seeds, 0, Stream.INITIAL_NOISE, (50,)).double()
    kept = (start - first_a * MEAN) / math.sqrt(first_a**2 * VARIANCE + first_s**2)
    end = MEAN + kept * a * VARIANCE / math.sqrt(a**2 * VARIANCE + s**2)
    errors = []
    for steps in (128, 256, 512):
        sampler = make(of(schedule), NUM_CLASSES, steps)
        samples = sampler.sample(stateless(gaussian_denoiser(schedule)), (50,), labels_of(4), 1, seeds)
        errors.append(float((samples - end).abs().mean()))
    for coarse, fine in pairwise(errors):
        assert order - 0.5 < math.log2(coarse / fine) < order + 0.2  # second order is log K/K² at these K


def test_ddim_is_eulers_method_on_the_path_of_flow_matching() -> None:
    schedule, steps = StraightPath(), 12
    seeds = sample_seeds(8, torch.arange(6))
    sampler = DDIMSampler(of(schedule), NUM_CLASSES, steps)
    velocity = gaussian_denoiser(schedule, 0.3, 2.0)  # any function of (z, t) will do for a velocity
    process = of(schedule)

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        return process.denoised(velocity(x, condition, loops), x, condition)

    samples = sampler.sample(stateless(predict), (40,), labels_of(6), 1, seeds)
    z = normal(seeds, 0, Stream.INITIAL_NOISE, (40,)).double()
    margin = 1 / (1 + math.exp(7.5))
    amount = [margin + (1 - k / steps) * (1 - 2 * margin) for k in range(steps)] + [0.0]  # of noise, none at the end
    for k in range(steps):
        time = torch.full((6,), 1 - k / steps).double()
        z = z + (amount[k + 1] - amount[k]) * velocity(z, Condition(labels_of(6).labels, time), 1)
    torch.testing.assert_close(samples.double(), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["x", "v", "epsilon"])
def test_what_the_network_predicts_does_not_change_the_samples(kind: Prediction) -> None:
    schedule, seeds = ShiftedCosine(0.5), sample_seeds(1, torch.arange(3))
    process, best = GaussianProcess(kind, schedule), gaussian_denoiser(schedule)

    def network(x: Tensor, condition: Condition, loops: int) -> Tensor:
        a, s = (v.view(-1, 1) for v in schedule.amounts(schedule.logsnr(condition.time)))  # type: ignore[arg-type]
        clean = best(x, condition, loops)
        return predicted(kind, clean, (x - a * clean) / s, a[:, 0], s[:, 0])

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        return process.denoised(network(x, condition, loops), x, condition)

    for make in MAKERS:
        sampler = make(of(schedule), NUM_CLASSES, 10)
        expected = sampler.sample(stateless(best), (30,), labels_of(3), 1, seeds)
        samples = sampler.sample(stateless(predict), (30,), labels_of(3), 1, seeds)
        torch.testing.assert_close(samples, expected, rtol=0, atol=2e-3)


# --- seeds, loops, known values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_a_sample_depends_on_its_own_seed_alone(make: Callable[..., DiffusionSampler]) -> None:
    sampler, seeds = make(of(), NUM_CLASSES, 5), sample_seeds(3, torch.arange(6))
    predict = gaussian_denoiser(sampler.schedule)
    together = sampler.sample(stateless(predict), (3, 4, 4), labels_of(6), 1, seeds)
    assert together.shape == (6, 3, 4, 4)
    assert together.dtype == torch.float32
    for i in range(6):
        alone = sampler.sample(stateless(predict), (3, 4, 4), labels_of(1), 1, seeds[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("make", MAKERS)
def test_loops_may_be_one_number_or_one_per_step(make: Callable[..., DiffusionSampler]) -> None:
    sampler = make(of(), NUM_CLASSES, 4)
    seen: list[tuple[int, float]] = []

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        assert condition.time is not None
        assert (condition.time == condition.time[0]).all()
        seen.append((loops, float(condition.time[0])))
        return torch.zeros_like(x)

    sampler.sample(stateless(predict), (2,), labels_of(1), [1, 2, 3, 5], sample_seeds(0, torch.arange(1)))
    assert seen == [(1, 1.0), (2, 0.75), (3, 0.5), (5, 0.25)]
    seen.clear()
    sampler.sample(stateless(predict), (2,), labels_of(1), 7, sample_seeds(0, torch.arange(1)))
    assert [loops for loops, _ in seen] == [7] * 4
    with pytest.raises(ValueError, match="loops"):
        sampler.sample(stateless(predict), (2,), labels_of(1), [1, 2], sample_seeds(0, torch.arange(1)))


@pytest.mark.parametrize("make", MAKERS)
def test_known_values_stay_and_the_rest_is_sampled(make: Callable[..., DiffusionSampler]) -> None:
    sampler, seeds = make(of(), NUM_CLASSES, 8), sample_seeds(2, torch.arange(5))
    known = torch.randn(5, 20).masked_fill(torch.rand(5, 20) < 0.5, torch.nan)
    predict = gaussian_denoiser(sampler.schedule)
    filled = sampler.sample(stateless(predict), (20,), labels_of(5), 1, seeds, known)
    free = sampler.sample(stateless(predict), (20,), labels_of(5), 1, seeds)
    given = ~known.isnan()
    assert torch.equal(filled[given], known[given])
    assert torch.equal(filled[~given], free[~given])  # this denoiser looks at one element at a time
    with pytest.raises(ValueError, match="known"):
        sampler.sample(stateless(predict), (20,), labels_of(5), 1, seeds, known[:, :10])


def test_the_state_of_a_known_value_is_that_value_with_the_noise_of_its_time() -> None:
    sampler = DDPMSampler(of(), NUM_CLASSES, 6, variance_interpolation=0.0)
    seen: list[tuple[float, Tensor]] = []

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        seen.append((float(condition.time[0]), x))  # type: ignore[index]
        return torch.zeros_like(x)

    known = torch.full((200, 300), 1.3)
    sampler.sample(stateless(predict), (300,), labels_of(200), 1, sample_seeds(9, torch.arange(200)), known)
    for time, state in seen:
        a, s = amounts(sampler.schedule, time)
        assert float(state.mean()) == pytest.approx(1.3 * a, abs=4.5 * s / math.sqrt(60_000) + 1e-3)
        assert float(state.var()) == pytest.approx(s**2, rel=4.5 * math.sqrt(2 / 60_000) + 1e-3)


def test_the_noise_of_each_step_is_fresh() -> None:
    sampler = DDPMSampler(of(), NUM_CLASSES, 5)
    states: list[Tensor] = []

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        states.append(x)
        return torch.zeros_like(x)

    draw(sampler, 200, 100, predict=predict)
    added = [states[0]]
    for (a, s), (b, u), now, after in zip(
        [amounts(sampler.schedule, 1 - k / 5) for k in range(4)],
        [amounts(sampler.schedule, 1 - k / 5) for k in range(1, 5)],
        states,
        states[1:],
        strict=False,
    ):
        added.append(after - now * (a / b) * (u / s) ** 2)  # with x̂ = 0 the rest of the step is noise
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in added]))
    assert (correlations - torch.eye(5)).abs().max() < 5 / math.sqrt(20_000)


def test_clip_bounds_every_prediction() -> None:
    for make in MAKERS:
        sampler = make(of(), NUM_CLASSES, 4, clip=0.5)
        samples = draw(sampler, 4, 50, predict=lambda x, condition, loops: 3 * x)
        assert samples.abs().max() == 0.5
        assert (samples.abs() < 0.5).any() or (samples > 0).any()


@pytest.mark.parametrize("make", MAKERS)
def test_a_half_precision_network_gives_finite_samples(make: Callable[..., DiffusionSampler]) -> None:
    process = GaussianProcess("v")

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        return process.denoised(torch.tanh(x).bfloat16(), x, condition)

    samples = draw(make(of(), NUM_CLASSES, 16), 4, 50, predict=predict)
    assert samples.dtype == torch.float32
    assert samples.isfinite().all()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (DDPMSampler, {"variance_interpolation": 1.5}),
        (DDIMSampler, {"clip": 0.0}),
        (DPMSolverSampler, {"steps": 0}),
    ],
)
def test_impossible_samplers_are_refused(make: Callable[..., DiffusionSampler], settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"variance_interpolation|clip|1 step"):
        make(of(), NUM_CLASSES, **settings)


def test_the_papers_default_steps() -> None:
    assert DDPMSampler(of(), NUM_CLASSES).steps == 512


# --- guidance --------------------------------------------------------------------------------------------------------


class ClassDependent:
    """A denoiser of Gaussian data whose mean is the class, and that counts what it is shown."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule, self.batches = schedule, list[int]()

    def __call__(self, x: Tensor, condition: Condition, loops: int) -> Tensor:
        self.batches.append(len(x))
        means = condition.labels.float().view(-1, 1)
        return gaussian_denoiser(self.schedule, 0.0, VARIANCE)(x, condition, loops) + means * 0.1


def test_guidance_of_scale_0_is_the_null_class_alone_and_costs_one_branch() -> None:
    seeds, labels = sample_seeds(4, torch.arange(3)), torch.tensor([0, 1, 2])
    guided, plain = (MAKERS[0](of(), NUM_CLASSES, 6, guidance=guidance) for guidance in (Guidance(0.0), None))
    network = ClassDependent(guided.schedule)
    sampled = guided.sample(stateless(network), (20,), Condition(labels), 1, seeds)
    assert network.batches == [3] * 6
    assert len(guided.network_calls(1)) == 6
    null = Condition(torch.full_like(labels, NUM_CLASSES))
    assert torch.equal(sampled, plain.sample(stateless(network), (20,), null, 1, seeds))
    assert [Guidance(0.0, "linear").branches(step, 3) for step in range(3)] == [2, 2, 1]


@pytest.mark.parametrize("make", MAKERS)
def test_guidance_of_scale_1_is_none_and_costs_one_branch(make: Callable[..., DiffusionSampler]) -> None:
    seeds, condition = sample_seeds(4, torch.arange(3)), Condition(torch.tensor([0, 1, 2]))
    results = []
    for guidance in (None, Guidance(1.0), Guidance(1.0 + 1e-7)):
        sampler = make(of(), NUM_CLASSES, 6, guidance=guidance)
        network = ClassDependent(sampler.schedule)
        results.append(sampler.sample(stateless(network), (20,), condition, 1, seeds))
        branches = 2 if guidance is not None and guidance.scale != 1 else 1
        assert network.batches == [3 * branches] * 6
        assert len(sampler.network_calls(1)) == 6 * branches
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_guidance_acts_in_its_interval_alone(make: Callable[..., DiffusionSampler]) -> None:
    sampler = make(of(), NUM_CLASSES, 10, guidance=Guidance(3.0, interval=(0.25, 0.7)))
    network = ClassDependent(sampler.schedule)
    samples = sampler.sample(
        stateless(network),
        (20,),
        Condition(torch.tensor([0, 2])),
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        sample_seeds(4, torch.arange(2)),
    )
    guided = [0.25 <= k / 10 < 0.7 for k in range(10)]
    assert network.batches == [4 if g else 2 for g in guided]
    assert [loops for loops, _ in sampler.network_calls(list(range(1, 11)))] == [
        1,
        2,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
        7,
        7,
        8,
        9,
        10,
    ]

    # By hand: the same sampler without guidance, around a function that guides where it should.
    plain = make(of(), NUM_CLASSES, 10)
    step = iter(range(10))

    def by_hand(x: Tensor, condition: Condition, loops: int) -> Tensor:
        conditional = ClassDependent(plain.schedule)(x, condition, loops)
        if not guided[next(step)]:
            return conditional
        null = Condition(torch.full_like(condition.labels, NUM_CLASSES), condition.time)
        unconditional = ClassDependent(plain.schedule)(x, null, loops)
        return 3 * conditional - 2 * unconditional

    expected = plain.sample(
        stateless(by_hand), (20,), Condition(torch.tensor([0, 2])), 1, sample_seeds(4, torch.arange(2))
    )
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-4)


def test_guidance_on_clean_predictions_equals_guidance_on_v() -> None:
    process = GaussianProcess("v")
    z, conditional, null, time = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8), torch.rand(3)
    told = Condition(torch.zeros(3, dtype=torch.long), time)
    on_v = process.denoised(null + 2.5 * (conditional - null), z, told)
    clean, clean_null = process.denoised(conditional, z, told), process.denoised(null, z, told)
    torch.testing.assert_close(clean_null + 2.5 * (clean - clean_null), on_v, rtol=0, atol=1e-5)


def test_masked_sampling_takes_an_interval_too() -> None:
    sampler = MaskGITSampler(MaskingProcess(5), num_classes=2, steps=4, guidance=Guidance(2.0, interval=(0.5, 1.0)))
    batches = []

    def predict(x: Tensor, condition: Condition, loops: int) -> Tensor:
        batches.append(len(x))
        return torch.zeros(*x.shape, 5)

    tokens = sampler.sample(
        stateless(predict), (9,), Condition(torch.tensor([0, 1])), 3, sample_seeds(0, torch.arange(2))
    )
    assert batches == [2, 2, 4, 4]
    assert sampler.network_calls(3) == [(3, ())] * 6
    assert ((tokens >= 0) & (tokens < 5)).all()


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.9, 0.1)])
def test_impossible_intervals_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="interval"):
        Guidance(2.0, interval=interval)

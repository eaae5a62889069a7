import math
from collections.abc import Callable, Sequence

import pytest
import torch
from predictions import stateless
from torch import Tensor

from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.masking import MaskingProcess, num_still_masked
from elt_lightning.processes.noise import Stream, gumbel, sample_seeds, uniform
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.guided_steps import GuidedSteps
from elt_lightning.samplers.masked import MaskGITSampler

V, T, CLASSES = 7, 25, 3
Predict = Callable[[Tensor, Condition, int], Tensor]


class Network:
    """A fixed random function of (position, all tokens, label, loops), with a record of its calls."""

    def __init__(self, seed: int, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(T, V + 1, V, generator=generator)
        self.by_label = torch.randn(CLASSES + 1, T, V, generator=generator)
        self.sharpness = sharpness
        self.tokens: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.loops: list[int] = []

    def __call__(self, tokens: Tensor, condition: Condition, loops: int) -> Tensor:
        self.tokens.append(tokens.clone())
        self.labels.append(condition.labels.clone())
        self.loops.append(loops)
        own = self.table[torch.arange(T), tokens]
        left = self.table[torch.arange(T), tokens.roll(1, dims=1)].roll(1, dims=-1)
        return self.sharpness * (own + 0.5 * left + self.by_label[condition.labels] + 0.1 * loops)


def guided_steps(network: Predict, guidance: Guidance, loops: int) -> GuidedSteps:
    return GuidedSteps(MaskGITSampler(MaskingProcess(V), CLASSES, 8, guidance=guidance), stateless(network), loops)


def some_known(batch: int, share: float) -> Tensor:
    known = torch.randint(0, V, (batch, T))
    return torch.where(torch.rand(batch, T) < share, known, V)


def still_masked_by_formula(unknown: int, now: int, step: int, steps: int) -> int:
    if now == 0 or step == steps - 1:
        return 0
    return max(1, min(now - 1, math.floor(unknown * math.cos(math.pi / 2 * (step + 1) / steps))))


def decode_by_hand(
    network: Predict,
    known: Tensor,
    labels: Tensor,
    seeds: Tensor,
    steps: int,
    loops: int,
    scales: Sequence[float] | None,
    choice_temperature: float,
) -> list[list[int]]:
    """Decode one sample after another with sorted lists, as the MaskGIT paper tells it."""
    decoded = []
    for sample in range(len(known)):
        tokens = known[sample].tolist()
        unknown = tokens.count(V)
        for step in range(steps):
            anneal = 1 - (step + 1) / steps
            x = torch.tensor([tokens])
            logits = network(x, Condition(labels[sample : sample + 1]), loops)[0].double()
            if scales is not None:
                null = network(x, Condition(torch.tensor([CLASSES])), loops)[0].double()
                logits = (1 - scales[step]) * null + scales[step] * logits
            one = seeds[sample : sample + 1]
            numbers = uniform(one, step, Stream.SAMPLED_TOKENS, (T,))[0].tolist()
            choice_noise = gumbel(one, step, Stream.SAMPLED_CONFIDENCE, (T,))[0].double()
            probabilities = (logits / (0.5 + 0.8 * anneal)).exp()
            hidden = [i for i in range(T) if tokens[i] == V]
            confidence = {}
            for i in hidden:
                shares = (probabilities[i] / probabilities[i].sum()).tolist()
                tokens[i] = next(v for v in range(V) if sum(shares[: v + 1]) >= numbers[i])
                log_p = logits[i, tokens[i]] - logits[i].exp().sum().log()
                confidence[i] = float(log_p + choice_temperature * anneal * choice_noise[i])
            keep_hidden = still_masked_by_formula(unknown, len(hidden), step, steps)
            for i in sorted(hidden, key=confidence.__getitem__)[:keep_hidden]:
                tokens[i] = V
        decoded.append(tokens)
    return decoded


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_samples_equal_a_decoder_written_out_for_one_sample_at_a_time(seed: int, steps: int, scale: float) -> None:
    torch.manual_seed(seed)
    guidance = Guidance(scale, "linear")
    sampler = MaskGITSampler(MaskingProcess(V), CLASSES, steps, choice_temperature=1.5 * seed, guidance=guidance)
    known, labels = some_known(6, share=0.25 * seed), torch.randint(0, CLASSES, (6,))
    seeds = sample_seeds(seed, torch.randint(0, 2**32, (6,)))
    network = Network(seed)
    tokens = sampler.sample(stateless(network), (T,), Condition(labels), 2, seeds, known)
    scales = [1 + (scale - 1) * (k + 1) / steps for k in range(steps)] if scale != 1 else None
    assert tokens.tolist() == decode_by_hand(network, known, labels, seeds, steps, 2, scales, 1.5 * seed)


@pytest.mark.parametrize("steps", [1, 3, 8, 24, 40])
@pytest.mark.parametrize("seed", range(3))
def test_given_tokens_never_change_no_mask_is_left_and_the_schedule_is_followed(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    known = torch.cat([some_known(7, 0.4), some_known(2, 0.0), some_known(1, 1.0)])
    before, given = known.clone(), known != V
    network = Network(seed)
    sampler = MaskGITSampler(MaskingProcess(V), CLASSES, steps)
    labels, seeds = torch.randint(0, CLASSES, (10,)), sample_seeds(seed, torch.arange(10))
    tokens = sampler.sample(stateless(network), (T,), Condition(labels), 1, seeds, known)
    assert torch.equal(known, before)
    assert tokens.dtype == torch.int64
    assert ((tokens >= 0) & (tokens < V)).all()
    states = [*network.tokens, tokens]
    assert len(states) == steps + 1
    unknown = (~given).sum(1).tolist()
    for step in range(steps):
        now, after = states[step] == V, states[step + 1] == V
        assert torch.equal(states[step][given], before[given])
        assert not (after & ~now).any(), "a decided token was masked again"
        assert torch.equal(states[step][~now], states[step + 1][~now]), "a decided token changed"
        counts = zip(unknown, now.sum(1).tolist(), after.sum(1).tolist(), strict=True)
        assert all(left == still_masked_by_formula(total, u, step, steps) for total, u, left in counts)
    assert torch.equal(tokens[given], before[given])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_fully_known_input_is_returned_unchanged(scale: float) -> None:
    known = torch.randint(0, V, (4, T))
    sampler = MaskGITSampler(MaskingProcess(V), CLASSES, 6, guidance=Guidance(scale))
    seeds = sample_seeds(0, torch.arange(4))
    tokens = sampler.sample(
        stateless(Network(0)), (T,), Condition(torch.zeros(4, dtype=torch.long)), 1, seeds, known.clone()
    )
    assert torch.equal(tokens, known)


def test_without_known_tokens_all_start_masked() -> None:
    network, seeds = Network(1), sample_seeds(0, torch.arange(4))
    condition, sampler = Condition(torch.tensor([0, 1, 2, 0])), MaskGITSampler(MaskingProcess(V), CLASSES, 5)
    tokens = sampler.sample(stateless(network), (T,), condition, 1, seeds)
    assert (network.tokens[0] == V).all()
    assert torch.equal(tokens, sampler.sample(stateless(network), (T,), condition, 1, seeds, torch.full((4, T), V)))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_samples_depend_on_their_own_seed_and_label_alone(scale: float) -> None:
    torch.manual_seed(3)
    network = LoopedMaskedTransformer(V, (5, 5), CLASSES, num_layers=1, width=16, num_heads=2).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    sampler = MaskGITSampler(MaskingProcess(V), CLASSES, 6, guidance=Guidance(scale))
    labels, seeds = torch.randint(0, CLASSES, (12,)), sample_seeds(9, torch.randperm(1000)[:12])

    @torch.no_grad()
    def sample(labels: Tensor, seeds: Tensor) -> Tensor:
        return sampler.sample(network, (T,), Condition(labels), 3, seeds)

    together = sample(labels, seeds)
    for size in (1, 5):
        parts = [sample(x, s) for x, s in zip(labels.split(size), seeds.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(12)
    assert torch.equal(sample(labels[order], seeds[order]), together[order])
    assert not torch.equal(sample(labels, seeds + 1), together)
    assert not torch.equal(sample((labels + 1) % CLASSES, seeds), together)


def test_loops_may_be_one_per_step() -> None:
    sampler, seeds = (
        MaskGITSampler(MaskingProcess(V), CLASSES, 4, guidance=Guidance(2.0)),
        sample_seeds(0, torch.arange(2)),
    )
    network, condition = Network(0), Condition(torch.tensor([0, 1]))
    sampler.sample(stateless(network), (T,), condition, [3, 1, 4, 2], seeds)
    assert network.loops == [3, 1, 4, 2]
    assert sampler.network_calls([3, 1, 4, 2]) == [(loops, ()) for loops in (3, 3, 1, 1, 4, 4, 2, 2)]
    assert sampler.with_settings(guidance=1.0).network_calls(5) == [(5, ())] * 4
    assert sampler.guidance.scale == 2.0
    for wrong in ([1, 2, 3], [1, 2, 3, 0], [], 0, -1, [1] * 5):
        with pytest.raises(ValueError, match="loops"):
            sampler.sample(stateless(network), (T,), condition, wrong, seeds)


@pytest.mark.parametrize("num_steps", [1, 5, 24])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_schedules_equal_their_formulas(num_steps: int, scale: float) -> None:
    for power in (0.5, 1.0, 2.7):
        for k in range(num_steps):
            u = (k + 1) / num_steps
            assert Guidance(scale).scale_at(k, num_steps) == scale
            assert Guidance(scale, "linear").scale_at(k, num_steps) == pytest.approx((1 - u) + scale * u)
            cosine = Guidance(scale, "power_cosine", power).scale_at(k, num_steps)
            # (1 − cos 2a)/2 = sin² a.
            assert cosine == pytest.approx(1 + (scale - 1) * math.sin(math.pi / 2 * u**power) ** 2)
        for schedule in ("constant", "linear", "power_cosine"):
            assert Guidance(scale, schedule, power).scale_at(num_steps - 1, num_steps) == pytest.approx(scale)


@pytest.mark.parametrize(("scale", "power"), [(-0.1, 1.0), (2.0, 0.0), (2.0, -1.0)])
def test_impossible_guidance_is_refused(scale: float, power: float) -> None:
    with pytest.raises(ValueError, match="guidance"):
        Guidance(scale, "power_cosine", power)


@pytest.mark.parametrize("schedule", ["constant", "linear", "power_cosine"])
def test_scale_one_calls_one_branch_and_is_the_plain_prediction(schedule: str) -> None:
    network, x, condition = Network(2), torch.randint(0, V + 1, (5, T)), Condition(torch.randint(0, CLASSES, (5,)))
    plain = network(x, condition, 3)
    network.tokens.clear()
    guided = guided_steps(network, Guidance(1.0, schedule), 3)(1, x, condition)
    assert torch.equal(guided, plain)
    assert [len(tokens) for tokens in network.tokens] == [5]
    # The limit of two branches as the scale goes to one is the same prediction.
    near = guided_steps(network, Guidance(1.0 + 1e-6, schedule), 3)(1, x, condition)
    torch.testing.assert_close(near, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_moves_from_the_null_class_towards_the_label(scale: float) -> None:
    network, x, labels = Network(4), torch.randint(0, V + 1, (5, T)), torch.randint(0, CLASSES, (5,))
    conditional = network(x, Condition(labels), 2).double()
    null = network(x, Condition(torch.full((5,), CLASSES)), 2).double()
    network.labels.clear()
    guided = guided_steps(network, Guidance(scale), 2)(0, x, Condition(labels))
    torch.testing.assert_close(guided.double(), scale * conditional + (1 - scale) * null, rtol=1e-4, atol=1e-4)
    assert [len(labels) for labels in network.labels] == [10 if scale else 5]  # at 0 the null class is all


def test_confidence_is_the_log_probability_under_untempered_guided_logits() -> None:
    sampler = MaskGITSampler(
        MaskingProcess(2), 1, 2, temperature_bias=1e-6, temperature_scale=0.0, choice_temperature=0.0
    )
    sampler = sampler.with_settings(guidance=2.0)

    def predict(tokens: Tensor, condition: Condition, loops: int) -> Tensor:
        seen.append(tokens)
        sign = torch.where(condition.labels == 1, -1.0, 1.0)[:, None, None]
        # Guided: 2·conditional − null = 3·these for the class, margins 0.3, 2.4 and 0.9.
        return sign * torch.tensor([[0.1, 0.0], [0.8, 0.0], [0.0, 0.3]]).expand(len(tokens), 3, 2)

    seen: list[Tensor] = []
    tokens = sampler.sample(
        stateless(predict), (3,), Condition(torch.tensor([0])), 1, sample_seeds(0, torch.tensor([4]))
    )
    # ⌊3·cos(π/4)⌋ = 2 stay masked. Under tempered logits every position would be certain, and the last be kept.
    assert seen[1][0].tolist() == [2, 0, 2]
    assert tokens.tolist() == [[0, 0, 1]]


def test_sampling_temperature_falls_linearly_to_its_bias() -> None:
    sampler = MaskGITSampler(MaskingProcess(V), CLASSES, 4, temperature_bias=0.5, temperature_scale=0.8)
    assert [sampler.temperature(step) for step in range(4)] == pytest.approx([1.1, 0.9, 0.7, 0.5])


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"temperature_bias": 0.0}, {"temperature_scale": -0.1}, {"choice_temperature": -1.0}],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"step|temperature"):
        MaskGITSampler(MaskingProcess(V), CLASSES, **wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_schedule_does_not_depend_on_the_default_dtype_that_true_half_precision_sets(dtype: torch.dtype) -> None:
    unknown = torch.arange(2000, 4000, 37)
    expected = num_still_masked(unknown, unknown, 3, 24)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        drawn = num_still_masked(unknown, unknown, 3, 24)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(drawn, expected)


def test_guidance_sees_logits_in_float32_at_least() -> None:
    """In half precision the differences that guidance scales would be rounding."""
    x, condition = torch.zeros(2, T, dtype=torch.long), Condition(torch.zeros(2, dtype=torch.long))
    for given in (torch.bfloat16, torch.float16, torch.float64):
        logits = torch.randn(2, T, V, dtype=given)
        seen = torch.float64 if given == torch.float64 else torch.float32
        assert torch.equal(MaskingProcess(V).denoised(logits, x, condition), logits.to(seen))

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from scipy import stats
from torch import Tensor

from elt_lightning.processes import noise
from elt_lightning.processes.conditioning import Condition, drop_labels
from elt_lightning.processes.noise import (
    Stream,
    batch_seed,
    categorical,
    gumbel,
    integer,
    over_steps,
    philox,
    random_bits,
    sample_seeds,
    uniform,
)

# Random123 1.14, tests/kat_vectors: "philox4x32 10", counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
WORD = 2**32


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    for round_number in range(10):
        k0 = (key[0] + round_number * 0x9E3779B9) % WORD
        k1 = (key[1] + round_number * 0xBB67AE85) % WORD
        high0, low0 = divmod(counter[0] * 0xD2511F53, WORD)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, WORD)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
    return counter


def philox_in_torch(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    return [int(word) for word in philox((c0, c1, c2, c3), (k0, k1))]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter: str, key: str, result: str) -> None:
    assert philox_in_torch(words(counter), words(key)) == words(result)
    assert philox_in_python(words(counter), words(key)) == words(result)


@pytest.mark.parametrize("seed", range(20))
def test_philox_equals_integer_arithmetic_on_random_words(seed: int) -> None:
    source = random.Random(seed)
    counter, key = [source.getrandbits(32) for _ in range(4)], [source.getrandbits(32) for _ in range(2)]
    assert philox_in_torch(counter, key) == philox_in_python(counter, key)


@pytest.mark.parametrize("case", range(5))
def test_random_bits_are_philox_of_block_step_stream_under_index_and_seed(case: int) -> None:
    source = random.Random(case)
    seed, index, step = source.getrandbits(31), source.getrandbits(32), source.getrandbits(32)
    stream, count = source.choice(list(Stream)), source.randint(1, 23)
    bits = random_bits(sample_seeds(seed, torch.tensor([index])), step, stream, count)
    expected = [w for block in range(6) for w in philox_in_python([block, step, int(stream), 0], [index, seed])]
    assert bits.tolist() == [expected[:count]]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (25,), (7, 11), (64, 17), (5, 3, 2)])
@pytest.mark.parametrize("draw", [uniform, gumbel])
def test_a_sample_draws_the_same_bits_whatever_stands_beside_it(
    draw: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    seeds = sample_seeds(17, torch.randint(0, WORD, (37,)))
    together = draw(seeds, 5, Stream.MASK_ORDER, shape)
    assert together.shape == (37, *shape)
    order = torch.randperm(37)
    assert torch.equal(draw(seeds[order], 5, Stream.MASK_ORDER, shape), together[order])
    for size in (1, 2, 5, 8, 36):
        parts = [draw(part, 5, Stream.MASK_ORDER, shape) for part in seeds.split(size)]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("draw", [uniform, gumbel])
def test_steps_drawn_at_once_are_those_drawn_one_by_one(draw: Callable[..., Tensor]) -> None:
    seeds = sample_seeds(4, torch.randint(0, WORD, (6,)))
    together = over_steps(draw, seeds, 5, Stream.SAMPLED_TOKENS, (3, 7))
    assert together.shape == (5, 6, 3, 7)
    assert torch.equal(together, torch.stack([draw(seeds, k, Stream.SAMPLED_TOKENS, (3, 7)) for k in range(5)]))


def test_more_numbers_of_a_sample_begin_with_the_same_ones() -> None:
    seeds = sample_seeds(3, torch.arange(4))
    assert torch.equal(uniform(seeds, 9, Stream.LABEL_DROP, (13,)), uniform(seeds, 9, Stream.LABEL_DROP, (40,))[:, :13])


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("stream", [Stream.MASK_RATIO, Stream.SAMPLED_TOKENS])
def test_uniform_and_gumbel_have_their_distributions(seed: int, stream: Stream) -> None:
    within_a_sample = sample_seeds(seed, torch.tensor([6]))
    over_samples = sample_seeds(seed, torch.arange(20_000))
    for seeds, shape in ((within_a_sample, (20_000,)), (over_samples, ())):
        assert stats.kstest(uniform(seeds, 3, stream, shape).flatten(), "uniform").pvalue > 1e-3
        assert stats.kstest(gumbel(seeds, 3, stream, shape).flatten(), "gumbel_r").pvalue > 1e-3
    over_steps = torch.cat([uniform(within_a_sample, step, stream) for step in range(2000)])
    assert stats.kstest(over_steps, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("word", [0, 1, 2**31, WORD - 512, WORD - 1])
def test_the_rarest_words_still_fall_inside_the_open_interval(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "random_bits", lambda seeds, step, stream, count: torch.full((len(seeds), count), word))
    value = uniform(torch.tensor([0]), 0, Stream.MASK_RATIO)
    assert value.dtype == torch.float32
    assert 0 < value.item() < 1
    assert abs(value.item() - word / WORD) <= 2**-23
    assert math.isfinite(gumbel(torch.tensor([0]), 0, Stream.MASK_RATIO).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_noise_does_not_depend_on_the_default_dtype_that_true_half_precision_sets(dtype: torch.dtype) -> None:
    seeds = sample_seeds(4, torch.arange(8))
    expected = gumbel(seeds, 2, Stream.SAMPLED_TOKENS, (300,))
    with default_dtype(dtype):
        drawn = gumbel(seeds, 2, Stream.SAMPLED_TOKENS, (300,))
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, expected)


def test_gumbel_argmax_samples_the_softmax() -> None:
    logits = torch.randn(6)
    drawn = (logits + gumbel(sample_seeds(8, torch.arange(30_000)), 1, Stream.SAMPLED_TOKENS, (6,))).argmax(1)
    expected = 30_000 * logits.double().softmax(0)
    assert stats.chisquare(torch.bincount(drawn, minlength=6), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("seed", [0, 123])
def test_streams_steps_samples_and_runs_share_no_number(seed: int) -> None:
    size = 4000
    base = uniform(sample_seeds(seed, torch.arange(size)), 7, Stream.MASK_ORDER)
    others: dict[str, Tensor] = {
        "next step": uniform(sample_seeds(seed, torch.arange(size)), 8, Stream.MASK_ORDER),
        "next run": uniform(sample_seeds(seed + 1, torch.arange(size)), 7, Stream.MASK_ORDER),
        "next sample": uniform(sample_seeds(seed, torch.arange(1, size + 1)), 7, Stream.MASK_ORDER),
        "next word": uniform(sample_seeds(seed, torch.arange(size)), 7, Stream.MASK_ORDER, (2,))[:, 1],
        "next block": uniform(sample_seeds(seed, torch.arange(size)), 7, Stream.MASK_ORDER, (5,))[:, 4],
    }
    others |= {s.name: uniform(sample_seeds(seed, torch.arange(size)), 7, s) for s in Stream if s is not s.MASK_ORDER}
    for name, other in others.items():
        joint = torch.bincount((base * 8).long() * 8 + (other * 8).long(), minlength=64)
        assert stats.chisquare(joint).pvalue > 1e-4, name


def test_stream_numbers_are_distinct() -> None:
    assert len({int(stream) for stream in Stream.__members__.values()}) == len(Stream.__members__)


def test_sample_seeds_are_distinct_and_fit_63_bits() -> None:
    indices = torch.tensor([0, 1, 2**31 - 1, 2**31, WORD - 1])
    seeds = torch.cat([sample_seeds(seed, indices) for seed in (0, 1, 2**31 - 1)])
    assert len(seeds.unique()) == len(seeds)
    assert (seeds >= 0).all()
    assert torch.equal(sample_seeds(5, indices.to(torch.float64).long()), sample_seeds(5, indices))
    for seed in (-1, 2**31):
        with pytest.raises(ValueError, match="seed"):
            sample_seeds(seed, indices)


def test_batch_seed_is_shared_by_all_samples_of_a_run_and_by_no_other_run() -> None:
    first, second = sample_seeds(11, torch.tensor([5, 6, 7])), sample_seeds(11, torch.tensor([90]))
    assert torch.equal(batch_seed(first), batch_seed(second))
    assert batch_seed(first).shape == (1,)
    assert not torch.equal(batch_seed(first), batch_seed(sample_seeds(12, torch.tensor([5]))))
    assert batch_seed(first).item() not in sample_seeds(11, torch.arange(1000))


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 4), (2, 9), (0, 6)])
def test_integer_is_uniform_and_equals_integer_arithmetic(low: int, high: int) -> None:
    steps = range(3000)
    drawn = [integer(21, step, Stream.STUDENT_EXIT, low, high) for step in steps]
    words_drawn = [philox_in_python([0, step, int(Stream.STUDENT_EXIT), 0], [WORD - 1, 21])[0] for step in steps]
    assert drawn == [low + math.floor(word / WORD * (high - low)) for word in words_drawn]
    counts = torch.bincount(torch.tensor(drawn) - low, minlength=high - low)
    assert len(counts) == high - low
    assert high - low == 1 or stats.chisquare(counts).pvalue > 1e-3


def test_labels_are_dropped_at_the_asked_share_and_independently_of_the_batch() -> None:
    labels, seeds = torch.randint(0, 10, (20_000,)), sample_seeds(1, torch.arange(20_000))
    dropped = drop_labels(labels, seeds, 4, 0.1, num_classes=10)
    share = (dropped == 10).sum().item()
    assert stats.binomtest(share, 20_000, 0.1).pvalue > 1e-3
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])
    assert torch.equal(drop_labels(labels[77:99], seeds[77:99], 4, 0.1, 10), dropped[77:99])
    assert not torch.equal(drop_labels(labels, seeds, 5, 0.1, 10), dropped)
    assert torch.equal(drop_labels(labels, seeds, 4, 0.0, 10), labels)
    assert (drop_labels(labels, seeds, 4, 1.0, 10) == 10).all()


def test_conditions_join_along_the_batch() -> None:
    first, second = Condition(torch.tensor([1, 2]), torch.tensor([0.1, 0.2])), Condition(torch.tensor([3]))
    joined = first.joined(first.with_labels(torch.tensor([9, 9])))
    assert joined.labels.tolist() == [1, 2, 9, 9]
    assert joined.time is not None
    assert torch.equal(joined.time, torch.tensor([0.1, 0.2, 0.1, 0.2]))
    assert second.joined(second).time is None


@pytest.mark.parametrize("seed", range(3))
def test_categorical_samples_the_softmax(seed: int) -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)) * 2
    logits[:, 2] = -torch.inf  # never drawn
    numbers = uniform(sample_seeds(seed, torch.arange(30_000)), 1, Stream.SAMPLED_TOKENS, (2,))
    drawn = categorical(logits.expand(30_000, 2, 6), numbers)
    assert drawn.shape == (30_000, 2)
    for column in range(2):
        counts = drawn[:, column].bincount(minlength=6)
        assert counts[2] == 0
        expected = logits[column].softmax(-1)
        kept = expected > 0
        chi_squared = ((counts[kept] - 30_000 * expected[kept]) ** 2 / (30_000 * expected[kept])).sum()
        assert stats.chi2.sf(float(chi_squared), 4) > 1e-4


def test_categorical_stays_in_range_where_probabilities_are_extreme() -> None:
    numbers = uniform(sample_seeds(0, torch.arange(20_000)), 0, Stream.SAMPLED_TOKENS)
    one = torch.full((20_000, 1024), -200.0)
    one[:, 1023] = 0.0
    assert (categorical(one, numbers) == 1023).all()
    flat = categorical(torch.zeros(20_000, 1024), numbers)
    assert flat.min() < 5
    assert 1018 < flat.max() < 1024

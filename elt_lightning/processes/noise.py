"""Counter-based randomness: what sample i draws at step k in stream s depends on (seed, i, k, s) and on nothing else.

A stateful generator makes results depend on batch size, worker count, device count and resuming. Here every random
number is a hash of what it is for, computed on the device by the Philox-4x32-10 block function (Salmon, Moraes, Dror
and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in 64-bit integer torch operations.

Letters: B batch, and ``shape`` the shape of one sample.
"""

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox-4x32 constants, Salmon et al. 2011, section 4.3
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW_32_BITS = 0xFFFFFFFF

Draw = Callable[[Tensor, int | Tensor, "Stream", tuple[int, ...]], Tensor]
"""``draw(seeds, step, stream, shape)``: :func:`uniform` or :func:`gumbel`."""


class Stream(IntEnum):
    """What a random number is for. Two purposes never share a stream, so they never share a number."""

    MASK_RATIO = 1
    MASK_ORDER = 2
    LABEL_DROP = 3
    STUDENT_EXIT = 4
    SAMPLED_TOKENS = 5
    SAMPLED_CONFIDENCE = 6
    TIME = 7
    NOISE = 8
    INITIAL_NOISE = 9
    SAMPLER_NOISE = 10
    DATA_ORDER = 11
    SHARD_ORDER = 12
    MIRRORED = 13
    POSTERIOR = 14
    CLIP_START = 15
    REVIVED_CODES = 16
    GIVEN_CELLS = 17


def sample_seeds(seed: int, indices: Tensor) -> Tensor:
    """Return a 63-bit seed for each sample: the run's seed in the high half, the sample's index in the low half.

    Args:
        seed: the run's seed, 0 ≤ seed < 2³¹.
        indices: (B,) integers in [0, 2³²), the samples' places in their data set.

    Returns:
        (B,) int64, different for every (seed, index).

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"a seed is an integer from 0 to 2^31 - 1, not {seed}")
    return (indices.long() & _LOW_32_BITS) | (seed << 32)


def batch_seed(seeds: Tensor) -> Tensor:
    """Return the seed that all samples of one run share, for draws made once per batch: (B,) to (1,)."""
    return seeds[:1] | _LOW_32_BITS


def random_bits(seeds: Tensor, step: int | Tensor, stream: Stream, count: int) -> Tensor:
    """Draw ``count`` 32-bit words for each sample.

    Args:
        seeds: (B,) int64 from :func:`sample_seeds`; the Philox key.
        step: training step or sampling step, 0 ≤ step < 2³²; or (B,) int64, one for each sample.
        stream: what the numbers are for.
        count: how many words each sample draws.

    Returns:
        (B, count) int64 with values in [0, 2³²).
    """
    blocks = torch.arange(-(-count // 4), device=seeds.device).expand(len(seeds), -1)
    steps = torch.full_like(blocks, step) if isinstance(step, int) else step[:, None].expand_as(blocks)
    counter = (blocks, steps, torch.full_like(blocks, int(stream)), torch.zeros_like(blocks))
    key = (seeds[:, None] & _LOW_32_BITS, (seeds[:, None] >> 32) & _LOW_32_BITS)
    return torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :count]


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply Philox-4x32-10: a 128-bit counter and a 64-bit key to 128 random bits, as 32-bit words in int64 tensors.

    The two lanes of a round do the same work, and are computed as one tensor: on a GPU, small draws take as long as
    launching their operations does.
    """
    lanes = torch.arange(2, device=key[0].device).view(2, *[1] * counter[0].ndim)
    rounds = torch.arange(_ROUNDS, device=key[0].device).view(_ROUNDS, *[1] * lanes.ndim)
    multipliers, increments = (first + lanes * (second - first) for first, second in (_MULTIPLIERS, _KEY_INCREMENTS))
    multiplied, kept = torch.stack(counter[::2]), torch.stack(counter[1::2])
    for round_key in ((torch.stack(key) + rounds * increments) & _LOW_32_BITS).unbind():
        # A product of two 32-bit words fills 64 bits; int64 wraps, which keeps every bit, and the mask drops the sign.
        product = (multiplied * multipliers).flip(0)  # what one lane multiplies, the other one takes
        multiplied, kept = ((product >> 32) & _LOW_32_BITS) ^ kept ^ round_key, product & _LOW_32_BITS
    return multiplied[0], kept[0], multiplied[1], kept[1]


def uniform(seeds: Tensor, step: int | Tensor, stream: Stream, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw from the open interval (0, 1): (B, *shape) float32, multiples of 2⁻²⁴, never 0 and never 1."""
    bits = random_bits(seeds, step, stream, math.prod(shape))
    # 23 bits and a half: the largest value, 1 − 2⁻²⁴, is still a float32 below 1.
    return (((bits >> 9).float() + 0.5) * 2.0**-23).reshape(len(seeds), *shape)


def gumbel(seeds: Tensor, step: int | Tensor, stream: Stream, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw standard Gumbel noise: (B, *shape) float32. argmax(logits + Gumbel) is a sample from softmax(logits)."""
    return -torch.log(-torch.log(uniform(seeds, step, stream, shape)))


def categorical(logits: Tensor, number: Tensor) -> Tensor:
    """Sample from softmax(logits): (B, …, V), and a number in (0, 1) for each distribution (B, …), to (B, …) int64.

    The first class whose cumulative probability reaches the number is taken. Gumbel noise would do as well, but draws V
    numbers where one is enough.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    # Scaled to the sum, which rounding leaves a little off 1: there is always a class that reaches it.
    return torch.searchsorted(cumulative, number[..., None] * cumulative[..., -1:]).squeeze(-1)


def over_steps(draw: Draw, seeds: Tensor, num_steps: int, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    """Draw for the steps 0 … K − 1 at once: (K, B, *shape), whose k-th is ``draw(seeds, k, stream, shape)``.

    This launches the operations of one draw instead of K.
    """
    steps = torch.arange(num_steps, device=seeds.device)[:, None].expand(-1, len(seeds))
    return draw(seeds.repeat(num_steps), steps.flatten(), stream, shape).unflatten(0, steps.shape)


def normal(seeds: Tensor, step: int, stream: Stream, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw standard normal noise: (B, *shape) float32, never beyond ±5.8.

    Box and Muller 1958: √(−2·log u)·cos(2π·w) and √(−2·log u)·sin(2π·w) are independent and normal for uniform u and w.
    """
    count = math.prod(shape)
    u, w = uniform(seeds, step, stream, (2, -(-count // 2))).unbind(1)
    radius, angle = torch.sqrt(-2 * torch.log(u.contiguous())), (2 * math.pi) * w.contiguous()
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pairs[:, :count].reshape(len(seeds), *shape)


def integer(seed: int, step: int, stream: Stream, low: int, high: int) -> int:
    """Draw one integer uniform on {low, …, high − 1} for a whole step: the same on every rank, known to the host."""
    bits = int(random_bits(torch.tensor([seed << 32 | _LOW_32_BITS]), step, stream, 1))
    return low + bits * (high - low) // 2**32

"""Masking of tokens: the mask token, how much is hidden in training, how much is still hidden in sampling.

Source: MaskGIT (Chang et al. 2022; google-research/maskgit, ``libml/mask_schedule.py``, ``libml/parallel_decode.py``).
"""

import math

import torch
from torch import Tensor

from elt_lightning.processes.base import Process


def check_codebook(size: int | None) -> int:
    """Return the size of the codebook (ValueError: there is none, as data that are continuous have none)."""
    if size is None:
        raise ValueError("a masked model needs tokens, and these data are continuous: their codebook_size is null")
    return size


class MaskingProcess(Process):
    """Hide tokens behind a mask token.

    Args:
        codebook_size: V, size of the codebook; the mask token is V.

    Raises:
        ValueError: the data have no codebook.
    """

    codebook_size: int

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = check_codebook(codebook_size)

    def hide(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Put the mask token where ``masked`` is true: (B, T) int64 and (B, T) bool to (B, T)."""
        return tokens.masked_fill(masked, self.codebook_size)

    def is_hidden(self, tokens: Tensor) -> Tensor:
        """Return where the mask token stands: (B, T) int64 to (B, T) bool."""
        return tokens == self.codebook_size


def cosine_mask_ratio(progress: Tensor) -> Tensor:
    """Return γ(r) = cos(π/2·r): 1 (all hidden) at r = 0, 0 at r = 1. Any shape in, the same shape out."""
    return torch.cos(progress * (math.pi / 2))


def random_mask(ratio: Tensor, scores: Tensor) -> Tensor:
    """Hide ⌈ratio·T⌉ positions, at least one: those with the lowest scores.

    Args:
        ratio: (B,) or (1,) in [0, 1].
        scores: (B, T) random numbers that decide which positions go first.

    Returns:
        (B, T) bool, True where hidden.
    """
    count = torch.ceil(ratio * scores.shape[1]).clamp(min=1)
    return ranks(scores) < count[:, None]


def num_still_masked(num_unknown: Tensor, num_masked: Tensor, step: int, num_steps: int) -> Tensor:
    """Return how many tokens stay masked after step k (0-based) of K: max(1, min(u − 1, ⌊U·cos(π/2·(k+1)/K)⌋)).

    Nothing stays masked after the last step, or where nothing was masked.

    Args:
        num_unknown: (B,) int64, U: tokens unknown when sampling started.
        num_masked: (B,) int64, u: tokens masked now.
        step: k.
        num_steps: K.

    Returns:
        (B,) int64.
    """
    if step + 1 == num_steps:
        return torch.zeros_like(num_masked)
    scheduled = (num_unknown.float() * math.cos(math.pi / 2 * (step + 1) / num_steps)).floor().long()
    return torch.minimum(scheduled, num_masked - 1).clamp(min=1).where(num_masked > 0, num_masked)


def ranks(scores: Tensor) -> Tensor:
    """Return each score's place in ascending order within its row: (B, T) to (B, T) int64, 0 for the lowest."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1)

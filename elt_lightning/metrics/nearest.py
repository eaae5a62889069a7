"""The nearest training items of samples: whether a model remembers what it was trained on."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """For each of n samples its k nearest items, the nearest first."""

    indices: Tensor  # (n, k) int64, places in the set that was searched
    # (n, k) float64, mean squared differences of pixels in [0, 1]; 0 where sample and item are the same
    distances: Tensor
    items: Tensor  # (n, k, …) uint8


def nearest_items(samples: Tensor, batches: Iterable[Tensor], count: int = 1) -> Nearest:
    """Search a set, batch by batch, for the items with the smallest mean squared pixel difference to each sample.

    Differences are exact; of items equally near the first one is taken. Memory holds the samples and one batch as
    float64, which the samples' device must have.

    Args:
        samples: (n, C, H, W) pictures or (n, C, F, H, W) clips, uint8.
        batches: the set, from the first item to the last: (B, …) uint8 of the samples' shape; B may vary.
        count: k.

    Raises:
        ValueError: samples or items are not bytes, shapes differ, or the set holds fewer than k items.
    """
    rows = _rows(samples, samples.shape[1:])
    indices = torch.empty(len(samples), 0, dtype=torch.int64, device=samples.device)
    distances = torch.empty(len(samples), 0, dtype=torch.float64, device=samples.device)
    items = samples.new_empty((len(samples), 0, *samples.shape[1:]))
    seen = 0
    for batch in batches:
        batch = batch.to(samples.device)
        found = _squared_differences(rows, _rows(batch, samples.shape[1:]))
        distances, order = torch.cat([distances, found], 1).sort(dim=1, stable=True)
        distances, order = distances[:, :count], order[:, :count]
        places = torch.arange(seen, seen + len(batch), device=samples.device).expand(len(samples), -1)
        indices = torch.cat([indices, places], 1).gather(1, order)
        items = _pick(items, batch, order)
        seen += len(batch)
    if seen < count:
        raise ValueError(f"cannot find the {count} nearest of {seen} items")
    return Nearest(indices, distances / (rows.shape[1] * 255**2), items)


def _rows(values: Tensor, shape: torch.Size) -> Tensor:
    """Flatten each of some bytes into a row of float64, in which sums of products of bytes are exact."""
    if values.dtype != torch.uint8 or values.shape[1:] != shape:
        raise ValueError(f"expected bytes of shape {tuple(shape)}, not {values.dtype} of {tuple(values.shape[1:])}")
    return values.flatten(1).double()


def _squared_differences(first: Tensor, second: Tensor) -> Tensor:
    """‖a − b‖² = ‖a‖² + ‖b‖² − 2·a·b of rows (n, D) and (m, D): (n, m)."""
    return first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T


def _pick(kept: Tensor, batch: Tensor, order: Tensor) -> Tensor:
    """Pick items (n, k, …) by their places (n, k) among those kept (n, j, …), and behind them the batch (m, …)."""
    old = kept.shape[1]
    picked = batch[(order - old).clamp(min=0)]
    if old == 0:
        return picked
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    was_kept = (order < old).view(*order.shape, *[1] * (kept.ndim - 2))
    return torch.where(was_kept, kept[rows, order.clamp(max=old - 1)], picked)

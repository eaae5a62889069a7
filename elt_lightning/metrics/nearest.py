"""The nearest training items of samples: whether a model remembers what it was trained on."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """The nearest item of each of n samples."""

    indices: Tensor  # (n,) int64, places in the set that was searched
    # (n,) float64, mean squared differences of pixels in [0, 1]; 0 where sample and item are the same
    distances: Tensor
    items: Tensor  # (n, …) uint8


def nearest_items(samples: Tensor, batches: Iterable[Tensor]) -> Nearest:
    """Search a set, batch by batch, for the item with the smallest mean squared pixel difference to each sample.

    Differences are exact; of items equally near the first one is taken. Memory holds the samples and one batch as
    float64, which the samples' device must have.

    Args:
        samples: (n, C, H, W) pictures or (n, C, F, H, W) clips, uint8.
        batches: the set, from the first item to the last: (B, …) uint8 of the samples' shape; B may vary.

    Raises:
        ValueError: samples or items are not bytes, shapes differ, or there is no item.
    """
    rows = _rows(samples, samples.shape[1:])
    distances = rows.new_full((len(rows),), torch.inf)
    indices, items = torch.zeros_like(distances, dtype=torch.int64), torch.empty_like(samples)
    seen = 0
    for batch in batches:
        batch = batch.to(samples.device)
        found = _squared_differences(rows, _rows(batch, samples.shape[1:]))
        places = found.argmin(1)  # the first of equals
        found = found.gather(1, places[:, None])[:, 0]
        nearer = found < distances
        distances[nearer], indices[nearer], items[nearer] = found[nearer], seen + places[nearer], batch[places[nearer]]
        seen += len(batch)
    if not seen:
        raise ValueError("there is no item to be the nearest")
    return Nearest(indices, distances / (rows.shape[1] * 255**2), items)


def _rows(values: Tensor, shape: torch.Size) -> Tensor:
    """Flatten each of some bytes into a row of float64, in which sums of products of bytes are exact."""
    if values.dtype != torch.uint8 or values.shape[1:] != shape:
        raise ValueError(f"expected bytes of shape {tuple(shape)}, not {values.dtype} of {tuple(values.shape[1:])}")
    return values.flatten(1).double()


def _squared_differences(first: Tensor, second: Tensor) -> Tensor:
    """‖a − b‖² = ‖a‖² + ‖b‖² − 2·a·b of rows (n, D) and (m, D): (n, m)."""
    return first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T

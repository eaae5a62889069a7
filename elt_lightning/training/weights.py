"""Weights read from a file, held against those of the network that they are for."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str:
    """Return how tensors of a file differ from those that are needed, with an example of each kind; "" for not at all.

    They differ in names, shapes, or in being whole numbers where fractions are needed; weights that are infinite or not
    numbers are named too.
    """
    both = sorted(expected.keys() & found.keys())
    shaped = [name for name in both if getattr(found[name], "shape", None) == expected[name].shape]
    typed = [name for name in shaped if found[name].is_floating_point() == expected[name].is_floating_point()]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(getattr(found[name], 'shape', ()))}, not {tuple(expected[name].shape)}"
            for name in both
            if name not in shaped
        ],
        "of another type": [f"{name} {found[name].dtype}" for name in shaped if name not in typed],
        "not finite": [name for name in typed if not own_part(found[name]).isfinite().all()],
    }
    return ", ".join(f"{len(names)} {kind} such as {names[0]}" for kind, names in kinds.items() if names)


def own_part(tensor: Tensor) -> Tensor:
    """Return this device's part of a sharded weight, or the weight."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Weights read from a file, held against those of the network that they are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elt_lightning.errors import UserError
from elt_lightning.files import is_file


def read_tensors(path: str | Path, what: str, where: str) -> dict[str, Tensor]:
    """Read a published state dict; no code of the file is run.

    Args:
        path: of the file.
        what: name of the weights, a plural.
        where: they are to be had.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not is_file(path):
        raise UserError(f"the {what} {path} do not exist: {where}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the unpickler raise
        raise UserError(f"cannot read the {what} {path} ({type(error).__name__}): {where}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a file of plain tensors, as the {what} are: {where}")
    return dict(state)


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

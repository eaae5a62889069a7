"""Weights read from a file, held against those of the network that they are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elt_lightning.errors import UserError
from elt_lightning.files import is_file

META = "meta.pt"
"""Of a checkpoint that is a folder, the file of what is no tensor; see
:mod:`elt_lightning.training.sharded_checkpoints`, which takes a second to import."""


def read_tensors(path: str | Path, what: str, where: str) -> dict[str, Tensor]:
    """Read a published state dict, of weights that are called ``what`` and are to be had ``where``.

    No code of the file is run.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not is_file(path):
        raise UserError(f"the {what} {path} do not exist: {where}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the unpickler raise
        raise UserError(f"cannot read the {what} {path} ({type(error).__name__}): {where}") from error
    return named_tensors(state, f"{path} is not a file of plain tensors, as the {what} are", where)


def named_tensors(content: Any, refusal: str, advice: str) -> dict[str, Tensor]:
    """Return what was read as {name: tensor}.

    Raises:
        UserError: it holds something else: ``refusal`` says what it is not, ``advice`` what to do.
    """
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{refusal}: it holds something else than tensors by name; {advice}")
    return dict(content)


def freeze(network: nn.Module, state: dict[str, Tensor], refusal: str, advice: str) -> None:
    """Make a file's tensors the parameters of a network built on ``meta``, in float32, and never train them.

    Nothing is initialised or copied. The last two arguments are those of :func:`named_tensors`.

    Raises:
        UserError: the tensors are not those of the network.
    """
    if faults := differences(network.state_dict(), state):
        raise UserError(f"{refusal} (tensors: {faults}): {advice}")
    network.load_state_dict(state, assign=True)
    network.float().requires_grad_(False).eval()


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str:
    """Return how tensors of a file differ from those that are needed, with an example of each kind; "" for not at all.

    They differ in names, shapes, or in being whole numbers, or fractions of a byte each, where fractions are needed;
    weights that are infinite or not numbers are named too.
    """
    both = sorted(expected.keys() & found.keys())
    shaped = [name for name in both if getattr(found[name], "shape", None) == expected[name].shape]
    typed = [name for name in shaped if _is_fraction(found[name]) == _is_fraction(expected[name])]
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


def _is_fraction(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1  # with those of a byte torch hardly computes


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Check that a checkpoint's weights are those of a network, before anything is loaded.

    Raises:
        UserError: names, shapes or types of the weights differ, or not all are finite.
    """
    if faults := differences(expected, found):
        raise UserError(f"the checkpoint is of another network, or its weights are damaged: {faults}")


def check_exported(exported: str, asked: str) -> None:
    """Check that an exported model has the weights that are asked for.

    Raises:
        UserError: it has the others alone.
    """
    if exported != asked:
        raise UserError(f"the exported model has {exported} weights alone: ask for them with --weights {exported}")


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint's weights with the averaged ones in place of the raw.

    Raises:
        UserError: the checkpoint holds no average.
    """
    if "ema" not in checkpoint:
        raise UserError("the checkpoint holds no averaged weights: ask for the raw ones with --weights raw")
    return checkpoint["state_dict"] | checkpoint["ema"]["weights"]


def own_part(tensor: Tensor) -> Tensor:
    """Return this device's part of a sharded weight, or the weight."""
    # Sharded ones are of DTensor, which takes most of a second to import.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

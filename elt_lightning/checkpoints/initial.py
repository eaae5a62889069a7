"""Where a training begins that does not begin from nothing: weights of another model, and an unlooped one made a loop.

Letters: M layers of the unlooped model, N shared layers, L loops.
"""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from elt_lightning.checkpoints.pretrained import build_module, chosen_weights, empty_module, read_pretrained, weights_in
from elt_lightning.errors import UserError
from elt_lightning.model import ELTModel
from elt_lightning.training.weights import differences

Init = Literal["average", "every_kth", "first", "blocks"]
"""Shared layer n of N is made of layers of the unlooped model, prelude and coda taken off: the average of those that
stand in its place in a loop, n, n + N, …; layer n·L alone; layer n alone; or the average of the L from n·L on. Sources:
Bae et al. 2024 (arXiv 2410.20672), whose "average" and "lower" are the first and third, and whose "stepwise" is like
the second, but keeps the last layer too."""

SOURCES: dict[str, Callable[[int, int, int], range]] = {
    "average": lambda n, num_layers, loops: range(n, num_layers * loops, num_layers),
    "every_kth": lambda n, num_layers, loops: range(n * loops, n * loops + 1),
    "first": lambda n, num_layers, loops: range(n, n + 1),
    "blocks": lambda n, num_layers, loops: range(n * loops, (n + 1) * loops),
}
"""{initialisation: (n, N, L) to the layers that shared layer n is the average of}."""


def begin_from(module: ELTModel, source: str | Path) -> str:
    """Put the weights of another model into one; return a line that says what was taken over and what starts fresh.

    Taken over is what has the same name and shape; averaged weights where there are any.

    Raises:
        UserError: there is no such model, nothing of it fits, or not all that fits is finite.
    """
    checkpoint = read_pretrained(source)
    weights = chosen_weights(checkpoint, weights_in(checkpoint))
    line = take_over(module, weights)
    if line is None:
        raise UserError(f"nothing of {source} has the name and shape of a weight of this model: it is of another kind")
    return f"begins from {source}: {line}"


def take_over(module: ELTModel, weights: Mapping[str, Tensor]) -> str | None:
    """Load what has a name and shape of the module; return what was taken over, what not; None where nothing fits.

    Raises:
        UserError: of what fits, not all is finite.
    """
    here = module.state_dict()
    fitting = {name: value for name, value in weights.items() if name in here and here[name].shape == value.shape}
    if not fitting:
        return None
    if faults := differences({name: here[name] for name in fitting}, fitting):
        raise UserError(f"the weights to begin from are damaged: {faults}")
    module.load_state_dict(fitting, strict=False)
    values = sum(value.numel() for value in fitting.values())
    fresh, left = [name for name in here if name not in fitting], [name for name in weights if name not in fitting]
    return f"taken over {len(fitting)} tensors ({values:,} values); fresh: {_listed(fresh)}; left out: {_listed(left)}"


def looped(
    checkpoint: dict[str, Any],
    num_layers: int,
    loops: int,
    init: Init,
    prelude: int = 0,
    coda: int = 0,
    recall: bool = False,
) -> tuple[dict[str, Any], ELTModel, str]:
    """Make a looped model of an unlooped one of prelude + N·L + coda layers.

    Args:
        checkpoint: from :func:`~elt_lightning.checkpoints.pretrained.read_pretrained`.
        num_layers: N.
        loops: L, that the model is to be trained at.
        init: how the shared layers are made.
        prelude: first layers that stay as they are, before the loop.
        coda: last layers that stay as they are, after it.
        recall: whether every loop reads the input again; what that needs starts fresh.

    Returns:
        the ``model`` section, the model, and a line that says what was taken over and what starts fresh.

    Raises:
        UserError: the model loops already, or has another number of layers.
    """
    if init not in get_args(Init):
        raise UserError(f"--init is one of {', '.join(get_args(Init))}, not {init}")
    section = copy.deepcopy(checkpoint["elt"]["model"])
    source = build_module(checkpoint, weights_in(checkpoint))
    backbone, settings = source.network.backbone, section["network"]["init_args"]
    if source.max_loops > 1 or len(backbone.prelude) or len(backbone.coda) or source.network.has_recall:
        raise UserError("the model loops already: elt loop takes one that was trained with max_loops 1 and no recall")
    if len(backbone.layers) != prelude + num_layers * loops + coda:
        raise UserError(
            f"the model has {len(backbone.layers)} layers, not {prelude} + {num_layers}·{loops} + {coda} (prelude, "
            "layers times loops, coda): choose others"
        )
    settings |= {"num_layers": num_layers, "prelude_layers": prelude, "coda_layers": coda, "recall": recall}
    distillation = section["distillation"]
    distillation.get("init_args", distillation).update(max_loops=loops, min_loops=1, mode="ilsd")
    weights = _of_loop(source.state_dict(), num_layers, loops, init, prelude, coda)
    module = empty_module(section)
    line = take_over(module, weights)
    assert line is not None
    used = {place for n in range(num_layers) for place in SOURCES[init](n, num_layers, loops)}
    unused = f" ({num_layers * loops - len(used)} of them left out)" if len(used) < num_layers * loops else ""
    return section, module.eval(), f"{num_layers} shared layers by {init} of {num_layers * loops}{unused}; {line}"


def _of_loop(
    state: Mapping[str, Tensor], num_layers: int, loops: int, init: Init, prelude: int, coda: int
) -> dict[str, Tensor]:
    """Return the weights of a looped model, made of those of an unlooped one."""
    stem = "network.backbone."
    of_layers: dict[str, dict[int, Tensor]] = {}
    weights = {}
    for name, value in state.items():
        if match := re.match(re.escape(stem) + r"layers\.(\d+)\.(.+)", name):
            of_layers.setdefault(match[2], {})[int(match[1])] = value
        else:
            weights[name] = value
    end = prelude + num_layers * loops
    for name, layers in of_layers.items():
        weights |= {f"{stem}prelude.{n}.{name}": layers[n] for n in range(prelude)}
        weights |= {f"{stem}coda.{n}.{name}": layers[end + n] for n in range(coda)}
        for n in range(num_layers):
            made_of = [layers[prelude + place] for place in SOURCES[init](n, num_layers, loops)]
            mean = torch.stack([layer.double() for layer in made_of]).mean(0)
            weights[f"{stem}layers.{n}.{name}"] = mean.to(made_of[0].dtype)
    return weights


def _listed(names: list[str], most: int = 4) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Elastic Looped Transformers: one small shared stack of layers, run L times, usable at every L.

Importing this package imports neither torch nor Lightning, so that ``elt --help`` answers at once; the names in
``__all__`` are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elt_lightning.checkpoints.pretrained import from_pretrained
    from elt_lightning.evaluation.drawing import load
    from elt_lightning.training.module import ELTModule

__version__ = "0.1.0"
__all__ = ["ELTModule", "__version__", "from_pretrained", "load"]

_HOMES = {
    "ELTModule": "elt_lightning.training.module",
    "from_pretrained": "elt_lightning.checkpoints.pretrained",
    "load": "elt_lightning.evaluation.drawing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Elastic Looped Transformers: one small shared stack of layers, run L times, usable at every L.

Importing this package imports neither torch nor Lightning, so that ``elt --help`` answers at once; the names in
``__all__`` are imported when they are first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elt_lightning.checkpoints.pretrained import from_pretrained
    from elt_lightning.evaluation.drawing import load
    from elt_lightning.training.module import ELTModule

__version__ = "0.1.0"
__all__ = ["ELTModule", "__version__", "from_pretrained", "load"]

SPIN_COUNT = "5000"
"""How often a thread of torch looks whether its neighbours are done before it lets others have its core.

OpenMP's own is 300,000: beside two other busy programs on two cores a picture then took 10 s in place of 0.2, since
every thread waited for one that had no core. On an idle machine 5,000 are as fast. It is read when torch is loaded,
which is after this package unless a program imports torch first; what the user has set stays.
"""
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

_HOMES = {
    "ELTModule": "elt_lightning.training.module",
    "from_pretrained": "elt_lightning.checkpoints.pretrained",
    "load": "elt_lightning.evaluation.drawing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""What a measurement was made on and with."""

import platform
import sys
from typing import Any

import torch

from elt_lightning import __version__


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name the hardware and the versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "elt_lightning": __version__,
        "command": " ".join(["elt", *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

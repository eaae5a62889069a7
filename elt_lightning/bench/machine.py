"""What a measurement was made on and with."""

import platform
from typing import Any

import torch

from elt_lightning import __version__


def describe_machine(device: torch.device, command: str) -> dict[str, Any]:
    """Name the hardware, the versions and the command."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "elt_lightning": __version__,
        "command": command,
    }


def device_name(device: torch.device) -> str:
    """Name a device as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

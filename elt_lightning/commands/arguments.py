"""What the command lines of the commands without a trainer share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from elt_lightning.data.crops import default_workers
from elt_lightning.errors import MOST, UserError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the rest of the program does."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        raise UserError(f"{self.prog}: {message}")


SEEDS = 2**31 - 1
"""The largest seed: noise hashes seeds as 32-bit integers."""


def whole(smallest: int, largest: int = 2**63 - 1) -> Callable[[str], int]:
    """Make a type of arguments that are whole numbers from ``smallest`` to ``largest``."""

    def parse(text: str) -> int:
        # More digits than any number here has: Python itself refuses to read thousands of them.
        if not text.isdecimal() or len(text) > 99 or not smallest <= int(text) <= largest:
            limit = f"to {largest}" if (text.isdecimal() and largest < 2**63 - 1) or len(text) > 9 else "up"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} {limit}")
        return int(text)

    return parse


def number(what: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Make a type of arguments that are finite numbers, ``what`` they are called, and which of them ``fits``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
        return value

    return parse


FINITE_FROM_0 = number("finite number from 0 up", lambda value: value >= 0)
ABOVE_0 = number("number above 0", lambda value: value > 0)


def between(low: float, high: float) -> Callable[[str], float]:
    """Make a type of arguments that are numbers from ``low`` to ``high``."""
    return number(f"number from {low:g} to {high:g}", lambda value: low <= value <= high)


def file_path(text: str) -> Path:
    """Parse where a file is to be written: no folder may be in its place, which is better known before than after."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    return Path(text)


def wholes(smallest: int, largest: int = 2**63 - 1) -> Callable[[str], list[int]]:
    """Make a type of arguments that are lists such as 1,2,4."""
    parse = whole(smallest, largest)
    return lambda text: [parse(part) for part in text.split(",")]


def choices_from(*choices: str) -> Callable[[str], list[str]]:
    """Make a type of arguments that are lists of some of ``choices``."""

    def parse(text: str) -> list[str]:
        parts = text.split(",")
        for part in parts:
            if part not in choices:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(choices)}")
        return parts

    return parse


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Describe which weights a command takes, see :func:`~elt_lightning.checkpoints.pretrained.meant`."""
    line = "averaged weights or raw ones (default: those that were exported, or the averaged)"
    parser.add_argument("--weights", choices=("ema", "raw"), help=line)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Describe where a command computes, see :func:`device_of`."""
    parser.add_argument("--device", help="for example cuda:1; by default a GPU where there is one")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what a command that decodes pictures or clips for a network takes of the machine."""
    workers, text = default_workers(), "decoding processes (default: one per core)"
    parser.add_argument("--num_workers", type=whole(0, MOST["num_workers"]), default=workers, help=text)
    add_device_argument(parser)


def device_of(name: str | None) -> torch.device:
    """Return the device of that name, or a GPU where there is one (UserError: there is no such device)."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=device).item()  # which meta, a device without memory, has none of
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device

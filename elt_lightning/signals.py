"""SIGTERM, which clusters send some time before they take a machine away, and Ctrl-C: how they end a command.

This file imports the standard library alone, so that the signals are met from the first moment.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ENDS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
"""The signals that end a command, and what they are called. The exit status is 128 + the signal's number."""


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let the signals end what runs in the block where it is, by :func:`end`."""
    before = {number: signal.getsignal(number) for number in ENDS}
    handle_signals(end)
    try:
        yield
    finally:
        for number, handler in before.items():
            handle_signals(handler, [number])


def handle_signals(handler: Any, signals: Any = ENDS) -> None:
    """Set the handler of the signals where Python allows it."""
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            signal.signal(number, handler)


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Leave the program in a line, with what is half done cleaned up; a second Ctrl-C cleans up nothing.

    Raises:
        SystemExit: always; it leaves the program with the status of the signal.
    """
    end_at_once_next_time()
    say(f"elt: ended by {ENDS[signal.Signals(number)]}")
    raise SystemExit(128 + number)


def end_at_once_next_time() -> None:
    """Let a second Ctrl-C end this process at once, whatever it is doing."""
    handle_signals(_end_at_once, [signal.SIGINT])


def say(line: str) -> None:
    """Write a line to stderr from a signal's handler, which may come in the middle of writing another line."""
    os.write(2, f"{line}\n".encode())


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h")  # a bar hides the cursor
    os._exit(128 + number)

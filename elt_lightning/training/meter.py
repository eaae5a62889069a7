"""How far a piece of work is: a bar on a terminal, a line now and then in logs and pipes."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn
from torch import distributed

Batch = TypeVar("Batch", bound=Sized)

EVERY_SECONDS = 15.0
"""At least this long between two lines."""

EVERY_SECONDS_ON_TERMINALS = 0.25
"""At least this long between two changes of a bar."""


def is_first_process() -> bool:
    """Return whether this is the first of the processes that work together, or the only one."""
    return rank_and_world_size()[0] == 0


def rank_and_world_size() -> tuple[int, int]:
    """Return which of the processes that work together this is, and how many they are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


class Meter:
    """Shows, between entering and leaving it, how much is done, how fast that goes and what time is left.

    Of several processes that work together only the first shows anything.

    Args:
        total: how much there is to do, None if unknown.
        unit: what is counted, in the singular, for example "step".
        done: how much was done before.
        shown: False to show nothing.
    """

    def __init__(self, total: int | None, unit: str, done: int = 0, shown: bool = True) -> None:
        self.total, self.unit, self.first, self.shown = total, unit, done, shown and is_first_process()
        self._began = self._last = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if self.shown and sys.stdout.isatty():
            self._bar = Progress(BarColumn(), TextColumn("{task.description}", markup=False), transient=True)
            self._task = self._bar.add_task(self._count(self.first), total=self.total, completed=self.first)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, note: Callable[[], str] = str, share: float | None = None, always: bool = False) -> None:
        """Show how far the work is, if it is time to.

        Args:
            done: how much is done, what was done before included.
            note: returns what else to show; it is only called when it is shown.
            share: of the work of this meter that is done, in (0, 1]; by default every unit takes equally long.
            always: leave a line, on a terminal too.
        """
        now = time.perf_counter()
        least = EVERY_SECONDS if self._bar is None else EVERY_SECONDS_ON_TERMINALS
        if not self.shown or done <= self.first or (now - self._last < least and not always):
            return
        self._last = now
        elapsed = max(now - self._began, 1e-9)
        parts = [self._count(done), note(), f"{(done - self.first) / elapsed:.1f} {plural(self.unit)}/s"]
        if self.total is not None:
            share = (done - self.first) / (self.total - self.first) if share is None else share
            parts.append(f"{duration(elapsed * (1 - share) / share)} left")
        line = "  ".join(part for part in parts if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=line)
        if self._bar is None or always:
            print(line, flush=True)  # above the bar, where there is one: it stays when the bar is gone

    def _count(self, done: int) -> str:
        return f"{self.unit} {done}" + ("" if self.total is None else f"/{self.total}")


def counted(batches: Iterable[Batch], unit: str, total: int | None) -> Iterator[Batch]:
    """Pass batches on, and show how many of their items there were."""
    done = 0
    with Meter(total, unit) as meter:
        for batch in batches:
            yield batch
            done += len(batch)
            meter.show(done)


def plural(unit: str) -> str:
    """Return the plural of what is counted."""
    return unit + ("es" if unit.endswith("ch") else "s")


def duration(seconds: float) -> str:
    """Return a time as it is read best: seconds below two minutes, else hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"

"""The one exception that means "the user can mend this"; the command line prints its message and nothing else."""

import os


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a command line.

    The message is one line that says what was wrong, where, and what to do.
    """


LOST_LOADER = (
    "a loader process was lost ({}): where memory or shared memory was full, lower num_workers, or give the machine or "
    "container more of it; what was finished before is whole: go on from it"
)
"""Message about a loader process that ended early, and how it did."""


def printable(text: str, longest: int = 300) -> str:
    """Return what a file says, fit for a terminal: control characters escaped, and too much of it cut in the middle.

    A name in a file may hold what a terminal takes for commands, or megabytes.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} […] {text[-longest // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error: Exception) -> str:
    """Return an error's message, as much of it as fits on one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


MOST = {
    "max_loops": 10**6,
    "loops": 10**6,
    "steps": 10**6,
    "num_samples": 10**8,
    "num_validation_samples": 10**8,
    "num_workers": 1000,
    "devices": 10**5,
}
"""The most that a setting of this name may be: nobody waits longer, and no machine has more of it."""


def check_most(**sizes: int | None) -> None:
    """Refuse, before anything is made of them, sizes that no machine gets through: see :data:`MOST`.

    Raises:
        UserError: one of these settings is too large.
    """
    for name, size in sizes.items():
        if size is not None and size > MOST[name]:
            raise UserError(f"{name} must be at most {MOST[name]}, not {size}")


def check_memory(what: str, needed: int, available: int | None = None) -> None:
    """Refuse what needs more bytes than there are, by default of this machine's memory, before any is allocated.

    Raises:
        UserError: it does not fit; ``what``, the setting that asks for that much, begins the message.
    """
    available = available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(f"{what} needs {needed / 2**30:,.0f} GiB of memory: there are {available / 2**30:,.0f}")

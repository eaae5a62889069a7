"""What fits into a machine's memory: asked before it is filled, as a system ends who fills it without a word."""

import os

from elt_lightning.errors import UserError


def machine_memory() -> int:
    """Return the bytes of memory that this machine has, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(what: str, needed: int, available: int | None = None) -> None:
    """Refuse what is larger than the whole memory, before any of it is allocated.

    Args:
        what: begins the message: which setting asks for that much.
        needed: bytes.
        available: bytes of a device; by default the machine's.

    Raises:
        UserError: it does not fit.
    """
    available = machine_memory() if available is None else available
    if needed > available:
        raise UserError(f"{what} needs {needed / 2**30:,.0f} GiB of memory: there are {available / 2**30:,.0f}")

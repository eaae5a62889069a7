"""The one exception that means "the user can mend this"; the command line prints its message and nothing else."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a command line.

    The message is one line that says what was wrong, where, and what to do.
    """


LOST_LOADER = (
    "a loader process was lost ({}): where memory or shared memory was full, lower num_workers, or give the machine or "
    "container more of it; what was finished before is whole: go on from it"
)
"""What to say of a loader process that ended before its time, and how it did."""

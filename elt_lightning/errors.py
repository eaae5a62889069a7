"""The one exception that means "the user can mend this"; the command line prints its message and nothing else."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a command line.

    The message is one line that says what was wrong, where, and what to do.
    """

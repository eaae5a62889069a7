"""The `elt` command. This file imports the standard library alone, so that help and version answer at once."""

import difflib
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Callable

from elt_lightning import __version__
from elt_lightning.errors import LOST_LOADER, UserError, printable
from elt_lightning.signals import ending_on_signals

SUBCOMMANDS = {
    "fit": "train a model from a config, or go on from a checkpoint",
    "validate": "measure losses and metrics on held-out data, once",
    "test": "sweep a checkpoint over loop counts: table, JSON, CSV, pictures",
    "predict": "write many samples of a checkpoint to files, over all devices",
    "sample": "draw a picture from a model alone, a row for each loop count",
    "demo": "show a page in the browser, whose picture follows a slider over the loops",
    "models": "list the trained models that come along",
    "compare": "lay the sweeps of several runs side by side: table and picture",
    "calibrate": "find what a compute budget is best spent on: steps, loops, guidance",
    "encode": "turn pictures into tokens or latents: WebDataset shards to train on",
    "stats": "measure a folder of pictures as FID's reference",
    "plan": "say what a config will need: memory, disk, steps, GPU-hours",
    "export": "write a checkpoint's model as safetensors and config.json",
    "push": "put a model on Hugging Face, with a card",
    "import": "read published weights of DiT or SiT into a model folder",
    "loop": "make a looped model of an unlooped one, to be trained on",
    "bench": "measure how fast this machine is with this program",
}
TRAINER = "elt_lightning.commands.train"
_MODULES = {name: f"elt_lightning.commands.{name}" for name in SUBCOMMANDS} | dict.fromkeys(
    ("fit", "validate", "test", "predict"), TRAINER
)
_MODULES["import"] = "elt_lightning.commands.import_published"

HELP = f"""elt {__version__}: Elastic Looped Transformers, one small stack run L times, usable at every L

usage: elt COMMAND [--flag value ...]

commands:
{chr(10).join(f"  {name:<10}{line}" for name, line in SUBCOMMANDS.items())}

options:
  -h, --help  show this text; after a command, show that command's flags
  --version   show the version
  --debug     show the traceback when something goes wrong

At once:      elt demo, or elt sample --model squares --loops 1,2,4,8
A first run:  elt fit --config configs/quickstart.yaml
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command: the exit status is 0, or 2 after one clear line on stderr about what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [with_underscores(argument) for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"elt {__version__}")
        return 0
    return status_of(lambda: run_command(arguments[0], arguments[1:]), debug=debug)


def status_of(work: Callable[[], object], program: str = "elt", debug: bool = False) -> int:
    """Do the work; return the exit status: 0, or 2 after one clear line on stderr about what the user can mend.

    Args:
        work: what is to be done.
        program: begins the line.
        debug: let errors through, with their tracebacks.
    """
    os.environ["MPLBACKEND"] = "agg"  # what is drawn here goes to files; another backend may not even exist
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show × shows the rest
    try:
        with ending_on_signals():
            work()
    except UserError as error:
        if debug:
            raise
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader has gone: end without a second complaint
        return 141
    except OSError as error:  # a full disk, a folder in the place of a file, missing rights: the message says it
        if debug:
            raise
        print(f"{program}: error: {one_line(what_failed(error))}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        end, of_device = end_of_loader(error), "out of memory" in str(error)  # torch's, which is not imported here
        if not debug and (of_device or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            where = "device" if of_device else "machine"
            print(f"{program}: error: the {where}'s memory is too small ({one_line(error)})", file=sys.stderr)
            return 2
        if debug or end is None:
            raise
        print(f"{program}: error: {LOST_LOADER.format(end)}", file=sys.stderr)
        return 2
    return 0


def run_command(name: str, arguments: list[str]) -> None:
    """Import the command's module, which may take seconds, and run it.

    Raises:
        UserError: there is no such command, or what the command itself refuses.
    """
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see elt --help"
        raise UserError(f"there is no command {name!r}: {hint}")
    if _MODULES[name] == TRAINER and {"-h", "--help"} & set(arguments):
        importlib.import_module("elt_lightning.commands.kept_help").run(name, TRAINER)
    else:
        importlib.import_module(_MODULES[name]).run(name, arguments)


LONGEST_LINE = 2000
"""Characters of an error's line."""


def with_underscores(argument: str) -> str:
    """Accept dashes in the names of flags: --ckpt-path becomes --ckpt_path. Of values a shell leaves --x=~/y alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    value = os.path.expanduser(value) if value.startswith("~/") else value
    return "--" + name[2:].replace("-", "_") + equals + value


def what_failed(error: OSError) -> str:
    """Return which file could not be read or written, and why."""
    reason = error.strerror or str(error) or type(error).__name__
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{place}{reason}" + ("; what was finished before is whole: make room and go on from it" if full else "")


def end_of_loader(error: BaseException | None) -> str | None:
    """Return how a loader process ended, if that caused an error, which PyTorch may raise anywhere."""
    while error is not None:
        found = re.search(r"DataLoader worker \(pid.*?\) (?:is )?(killed by signal[^.]*|exited[^.]*)", str(error))
        if found:
            return found.group(1)
        error = error.__cause__ or error.__context__
    return None


def one_line(message: object) -> str:
    """Fold an error's message into one line, fit for a terminal: see :func:`elt_lightning.errors.printable`."""
    return printable(" ".join(str(message).split()), LONGEST_LINE)


if __name__ == "__main__":
    sys.exit(main())

"""Loader processes: what they do about SIGTERM and batches that they cannot hand on, and how errors are reported."""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.util import get_temp_dir
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch.utils.data import DataLoader, Dataset

from elt_lightning.errors import LOST_LOADER, UserError, first_line

Batch = TypeVar("Batch")

LONGEST_SOCKET_PATH = 103
"""Bytes that macOS takes for the path of a socket; Linux takes four more."""


class Loader(DataLoader[Batch]):
    """Loads whole batches from a data set that returns them, by an order of requests; None for a stream.

    ``num_workers`` processes load, 0 for this one. Settings are those of :class:`DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], order: Iterable[Any] | None, num_workers: int, **settings: Any) -> None:
        settings |= {"sampler": order, "num_workers": num_workers, "worker_init_fn": obey_parent_alone}
        super().__init__(dataset, batch_size=None, **settings)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where a pass begins is asked of the trainer, which is how Lightning knows it can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing, see :meth:`state_dict`."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Return batch after batch.

        Raises:
            UserError: what the data set raises, or the path of the temporary folder is too long for the sockets of
                loader processes, or one was lost while it handed a batch over. PyTorch reports one that ends at another
                time in the middle of anything: the command line recognises that.
        """
        if self.num_workers:
            check_temporary_folder()
        try:
            yield from super().__iter__()
        except UserError as error:
            # A loader process sends its traceback along; the last line has the message.
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
        except (OSError, EOFError) as error:
            if not self.num_workers or "in DataLoader worker" in str(error):  # the data set's own
                raise
            raise UserError(LOST_LOADER.format(first_line(error))) from error


def check_temporary_folder() -> None:
    """Look whether loader processes can open sockets in the folder for temporary files.

    Raises:
        UserError: its path is too long.
    """

    def has_room(folder: str) -> bool:
        return len(os.fsencode(f"{folder}/listener-12345678")) <= LONGEST_SOCKET_PATH

    # What Python would make is looked at first, as it is made once; newer ones make it elsewhere where need be.
    if not has_room(f"{tempfile.gettempdir()}/pymp-12345678") and not has_room(get_temp_dir()):
        raise UserError(
            f"the folder for temporary files, {tempfile.gettempdir()}, has too long a path for the sockets of loader "
            "processes: set the environment variable TMPDIR to a shorter one, or num_workers to 0"
        )


def end_where_batches_are_lost() -> None:
    """Let a loader process end when it cannot hand on a batch, for example because shared memory is full.

    Python would drop the batch and go on, and the main process wait for it for ever. Nor is it worth a traceback that
    the main process ends while it takes a batch over.
    """
    Queue._on_queue_feeder_error = staticmethod(_end_of_lost_batch)  # type: ignore[attr-defined]
    sys.excepthook = _unless_cut_off


def _end_of_lost_batch(error: Exception, batch: Any) -> NoReturn:
    print(f"elt: a loader process cannot hand on a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def obey_parent_alone(worker: int) -> None:
    """Let a loader process go on when a scheduler sends SIGTERM, or Ctrl-C SIGINT, to all processes.

    The main process decides: a training finishes its step and saves
    (:class:`~elt_lightning.training.preemption.Preemption`), for which it may wait for a batch, and any other work
    would take the loader process for lost if it ended first. SIGTERM from the main process itself still ends a loader
    process, and so does the main process's end, which PyTorch looks for. Where the system does not say who sent a
    signal (macOS), nothing is changed. A batch that is lost ends it too: :func:`end_where_batches_are_lost`.
    """
    end_where_batches_are_lost()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

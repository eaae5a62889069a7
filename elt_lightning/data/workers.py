"""What loader processes do about SIGTERM."""

import os
import signal
import threading


def obey_parent_alone(worker: int) -> None:
    """Let a loader process go on when a scheduler sends SIGTERM to all processes of a job.

    The main process then finishes its step and saves (:class:`~elt_lightning.callbacks.preemption.Preemption`), for
    which it may wait for a batch. SIGTERM from the main process itself ends a loader process as ever, and so does the
    main process's end, which PyTorch looks for. Where the system does not say who sent a signal (macOS), nothing is
    changed.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

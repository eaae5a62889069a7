"""`elt` in processes of its own, forked from one that has imported everything: they start soon, and can be killed."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

import torch

from elt_lightning.cli import main
from elt_lightning.objectives.ilsd import ILSD

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "sklearn.datasets",
        "tensorboard",
        "torch.distributed.checkpoint",
        "torch.utils.tensorboard",
        "elt_lightning.commands.encode",
        "elt_lightning.commands.train",
        "elt_lightning.data.toy.digits",
        "elt_lightning.data.imagenet",
        "elt_lightning.networks.diffusion",
        "elt_lightning.networks.masked",
        "elt_lightning.evaluation.report",
    ]
)


def start(arguments: Sequence[str], folder: Path, log: Path, environment: dict[str, str] | None = None) -> BaseProcess:
    """Start `elt` in a folder, as the leader of a process group, with one thread; what it says goes into the log."""
    process = _CONTEXT.Process(target=_run, args=(list(arguments), folder, log, environment or {}))
    process.start()
    return process


def kill_group(process: BaseProcess) -> None:
    """Kill a process and its loader processes with SIGKILL."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process.pid, SIGKILL)  # it may not lead a group yet
    process.join()


def elt_on_ranks(
    arguments: Sequence[str], folder: Path, ranks: int, nodes: int = 1, launcher: str = "torchrun", status: int = 0
) -> list[str]:
    """Run `elt` as so many processes, as a launcher starts them; give what each wrote.

    The exits that students have in each step are written to ``exits_<rank>.txt``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    per_node = ranks // nodes
    processes = [
        start(arguments, folder, log, ENVIRONMENTS[launcher](rank, ranks, per_node, port) | {"EXITS": f"{rank}"})
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.join(180)
    finally:
        for process in processes:
            kill_group(process)
    written = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [status] * ranks, "\n".join(written)
    return written


def _torchrun(rank: int, ranks: int, per_node: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "GROUP_RANK": str(rank // per_node),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }


def _srun(rank: int, ranks: int, per_node: int, port: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "elt",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(ranks // per_node),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


ENVIRONMENTS = {"torchrun": _torchrun, "srun": _srun}


def _run(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loader processes; a child of the server would use it too
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if "EXITS" in environment:
        _record_exits(folder / f"exits_{environment['EXITS']}.txt")
    sys.exit(main(arguments))


def _record_exits(path: Path) -> None:
    choose = ILSD.student_exits
    path.unlink(missing_ok=True)

    def recorded(self: ILSD, seed: int, step: int) -> tuple[int, ...]:
        exits = choose(self, seed, step)
        with path.open("a") as file:
            print(step, *exits, file=file)
        return exits

    ILSD.student_exits = recorded  # type: ignore[method-assign]

"""How fast training goes and how much memory it takes."""

import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

GIB = 2**30


class Throughput(Callback):
    """Log samples per second over all devices, and peak memory in GiB: of the device, or of the process on a CPU."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start_again()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log at the steps that the trainer logs: every ``log_every_n_steps`` of all epochs."""
        self._samples += len(batch.x) * trainer.world_size
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and trainer._logger_connector.should_update_logs:  # what is logged at other steps is dropped
            speed = self._samples / (time.perf_counter() - self._since)
            pl_module.log_dict(
                {"train/samples_per_second": speed, "train/peak_memory_gib": peak_memory(pl_module.device)}
            )
            self._start_again()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time that validation took out of the speed of training."""
        self._start_again()

    def _start_again(self) -> None:
        self._samples, self._since = 0, time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated on a CUDA device, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

"""Sampling with a network that runs in onnxruntime."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elt_lightning.onnx_runner import OnnxNetwork
from elt_lightning.processes.base import Process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.samplers.base import Predict


def predict_by(network: OnnxNetwork, process: Process) -> Predict:
    """Return a network's ONNX graphs as the function that a sampler calls, on the CPU.

    Args:
        network: of the folder that `elt export --format onnx` wrote.
        process: the model's, which turns predictions into logits or x̂.
    """

    def predict(
        x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        predictions, ended = network(x, condition, loops, exits, state)
        denoised = {r: process.denoised(torch.from_numpy(p), x, condition) for r, p in predictions.items()}
        return denoised, torch.from_numpy(ended)

    return predict

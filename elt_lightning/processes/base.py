"""What is done to data that a network learns to undo; one object for training and sampling alike."""

import torch
from torch import Tensor

from elt_lightning.processes.conditioning import Condition


class Process:
    """How data are corrupted, and what a network's output says of the clean data.

    A model has one; its objective and its sampler are given it, so that they cannot differ.

    Attributes:
        codebook_size: V, of tokens; None where data are continuous.
    """

    codebook_size: int | None = None

    def denoised(self, prediction: Tensor, noisy: Tensor, condition: Condition) -> Tensor:
        """Return what samplers see of a network's output for ``noisy``: logits, or x̂ of noisy latents.

        In float32 at least: in half precision the differences that guidance scales would be rounding.
        """
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def check_process(user: object, process: Process, kind: type[Process]) -> None:
    """Check that an objective or a sampler is given the kind of process it is made for (ValueError: it is not)."""
    if not isinstance(process, kind):
        raise ValueError(
            f"{type(user).__name__} needs a {kind.__name__} as the model's process, not a {type(process).__name__}"
        )

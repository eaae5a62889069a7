"""Plain functions in the place of networks."""

from collections.abc import Callable, Sequence

from torch import Tensor

from elt_lightning.processes.conditioning import Condition
from elt_lightning.samplers.base import Predict


def stateless(function: Callable[[Tensor, Condition, int], Tensor]) -> Predict:
    """Let samplers call a function of (x, condition, loops) as they call a network."""

    def predict(
        x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        return {loops: function(x, condition, loops)}, x

    return predict

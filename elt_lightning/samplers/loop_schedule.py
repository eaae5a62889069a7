"""How the loops of a sample are spread over its sampling steps, and when a loop may stop before its end."""

import math
from dataclasses import dataclass
from typing import Literal

LoopShape = Literal["constant", "falling", "rising"]


@dataclass(frozen=True)
class LoopSchedule:
    """Loops L_k of sampling step k (0-based) of K, given their mean L.

    Attributes:
        shape: "constant" L_k = L; "falling" L_k = L + (L − 1)·(1 − 2k/(K − 1)), rounded, from 2L − 1 to 1, of the same
            sum; "rising" the other way round.
        tolerance: τ ≥ 0. A sample's loop stops when its prediction differs by at most τ from that of the loop before,
            as the sampler measures it; the first loop of a step is compared with the end of the step before. L_k is
            then the most. This needs a network with recall. None: every loop is run.
    """

    shape: LoopShape = "constant"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "falling", "rising"):
            raise ValueError(f"a loop schedule is constant, falling or rising, not {self.shape}")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be a number from 0 up, not {self.tolerance}")

    def per_step(self, loops: int, num_steps: int) -> list[int]:
        """List L_k for every step."""
        slope = {"constant": 0, "falling": 1, "rising": -1}[self.shape]
        last = num_steps - 1
        # Python rounds halves of d and −d alike, so that the sum stays K·L.
        return [loops + round(slope * (loops - 1) * (last - 2 * step) / max(1, last)) for step in range(num_steps)]

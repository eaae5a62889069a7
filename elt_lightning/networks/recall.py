"""Recall: every loop reads the embedded input again, so that further loops refine an answer and do not drift from it.

Without recall a loop knows its input only by what the loops before it left of it: h_0 = e, h_l = g(h_(l−1)). With
recall h_l = g(join(h_(l−1), e)). The loop can then tend to a fixed point that depends on the input and not on where the
loop began, so that it may begin from the state that an earlier pass ended with. Sources: Bai et al. 2019 (arXiv
1909.01377), Bansal et al. 2022 (2202.05826), Anil et al. 2022 (2211.09961).

Letters: B batch, T tokens, D width; e the embedded input (B, T, D), after the prelude.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class Recalled(NamedTuple):
    """What a pass derives from its input once, for all loops: join(h, e) = decay ⊙ h + drive."""

    drive: Tensor  # (B, T, D)
    decay: Tensor | None = None  # (D,), or None for 1

    def join(self, h: Tensor) -> Tensor:
        """Return what the next loop is applied to, (B, T, D)."""
        return h + self.drive if self.decay is None else torch.addcmul(self.drive, self.decay, h)


class Recall(nn.Module, ABC):
    """How the loops of a stack read the input again, and which state is carried from one pass to the next.

    Its parameters are neither kernels nor scalars: weight decay leaves them alone, and sharding accepts them.
    """

    @abstractmethod
    def recalled(self, e: Tensor) -> Recalled:
        """Derive from e what every loop joins with its state."""

    def begin(self, e: Tensor, state: Tensor | None) -> Tensor:
        """Return h_0: the state (B, T, D) that an earlier pass ended with, or zero."""
        # Where gradients are kept, zero has one too: compiled loops see the first state as they see the others.
        return torch.zeros_like(e, requires_grad=torch.is_grad_enabled()) if state is None else state

    def end(self, e: Tensor, h: Tensor) -> Tensor:
        """Return the state (B, T, D) that another pass may begin from, given h after the last loop."""
        return h


class AdditiveRecall(Recall):
    """join(h, e) = h + β·e with one learned β, for post-norm blocks, whose norms keep h bounded; β begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(1))

    def recalled(self, e: Tensor) -> Recalled:
        """See the class."""
        return Recalled(self.weight * e)


class ResidualRecall(Recall):
    """What the loops added to the input decays, the input does not: for pre-norm blocks, whose streams would grow.

    A pre-norm stack returns its input plus residuals, g(x) = x + f(x). With r = h − e for what the loops have added so
    far, r_l = a⊙r_(l−1) + f(e + a⊙r_(l−1)), r_0 = 0. With a = 1 that is the loop without recall; a < 1 bounds r and
    makes the loop forget where it began. In terms of h: join(h, e) = a⊙h + (1 − a)⊙e, h_0 = e + r_0.

    The state that is carried is r: in another pass the new input takes the place of the old one entirely.

    a = sigmoid(logit) in (0, 1) is learned, one for each channel. Beginning at 0.7 or 0.9, a diffusion model is as good
    from zero, but worse with the state carried (whole) at the loop count of training.

    Args:
        width: D.
        decay: a at the beginning.
    """

    def __init__(self, width: int, decay: float = 0.5) -> None:
        super().__init__()
        self.logit = Parameter(torch.full((width,), decay).logit())

    def recalled(self, e: Tensor) -> Recalled:
        """See the class."""
        decay = self.logit.sigmoid()
        return Recalled((1 - decay) * e, decay)

    def begin(self, e: Tensor, state: Tensor | None) -> Tensor:
        """Return h_0 = e + r_0."""
        return e if state is None else e + state

    def end(self, e: Tensor, h: Tensor) -> Tensor:
        """Return r after the last loop."""
        return h - e

"""What training, samplers, benchmarks and plans ask of a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from elt_lightning.networks.looped import LoopedStack
from elt_lightning.processes.conditioning import Condition


class Pass(NamedTuple):
    """What one pass through a network finds.

    Attributes:
        predictions: {r: prediction} for every exit and for the number of loops: logits (B, T, V), or what a network of
            noisy latents predicts, (B, C, …).
        state: (B, T, D) of the loop at its end, from which another pass can begin if the network has recall.
    """

    predictions: dict[int, Tensor]
    state: Tensor


class LoopedNetwork(nn.Module, ABC):
    """A network whose shared layers run any number of times, with one head for all exits.

    Attributes:
        backbone: the looped stack.
        input_shape: of one sample as the data have it: the token grid ([frames], height, width), or (channels,
            [frames], height, width).
        sample_shape: of one sample as the network takes it: (T,) tokens, or that of latents.
        width: D of the loop's state.
    """

    backbone: LoopedStack
    input_shape: tuple[int, ...]
    sample_shape: tuple[int, ...]
    width: int
    __call__: Callable[..., Pass]

    def forward(
        self,
        x: Tensor,
        condition: Condition,
        loops: int,
        exits: Sequence[int] = (),
        state: Tensor | None = None,
    ) -> Pass:
        """Predict at each exit of one pass.

        Args:
            x: (B, …, as ``sample_shape`` says) tokens or noisy latents.
            condition: labels, and for diffusion the time.
            loops: L ≥ 1.
            exits: further loop counts in [1, loops]. Each equals a fresh pass of that many loops.
            state: to begin the loop from, :attr:`Pass.state` of an earlier pass; None to begin anew.

        Raises:
            ValueError: loops or exits out of range, or a state for a network without recall.
        """
        h, embedded = self.embed(x, condition)
        modulation = self.head_modulation(embedded)
        states, state = self.backbone(h, embedded, loops, exits, state)
        return Pass({loop: self.read_out(h, modulation) for loop, h in states.items()}, state)

    @abstractmethod
    def embed(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Embed the input, (B, T, D), and what the blocks are modulated by, (B, width of the condition) or None."""

    def head_modulation(self, condition: Tensor | None) -> Any:
        """Derive from the embedded condition what the head needs at every exit; nothing by default."""
        return None

    @abstractmethod
    def read_out(self, h: Tensor, modulation: Any) -> Tensor:
        """Turn what leaves at an exit, (B, T, D), into a prediction: the head, one for all exits."""

    @abstractmethod
    def macs(self, loops: int, exits: Sequence[int] = ()) -> int:
        """Count the multiply–accumulates of one sample's pass, with attention products and a head for each exit."""

    @property
    def has_recall(self) -> bool:
        """Whether every loop reads the input again, so that the loop may begin from a carried state."""
        return self.backbone.recall is not None

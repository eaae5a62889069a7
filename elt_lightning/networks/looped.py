"""The looped backbone F_(N,L)(x) = g(g(… g(x))): N shared layers g, applied L times (paper, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elt_lightning.networks.blocks import Block


class LoopedStack(nn.Module):
    """Prelude layers once, N shared layers L times, coda layers once; the state at any loop from one pass.

    ELT has neither prelude nor coda; its neighbour Looped-DiT (arXiv 2609.40305) has both. No layer is told which
    loop it is in, so ``loops`` is free at every call: below, at or above what training used.

    Args:
        make_block: builds one layer.
        num_layers: N, the unique layers inside the loop.
        prelude_layers: layers before the loop.
        coda_layers: layers after the loop, applied to every exit.
        final_norm: applied to every exit after the coda.
        checkpoint_loops: in training, keep only the state between loops and compute each loop again for its gradient.
            Memory no longer grows with layers times loops, a step takes about a third longer, gradients are the same.

    Raises:
        ValueError: no layer inside the loop.
    """

    def __init__(
        self,
        make_block: Callable[[], Block],
        num_layers: int,
        prelude_layers: int = 0,
        coda_layers: int = 0,
        final_norm: nn.Module | None = None,
        checkpoint_loops: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        self.prelude = nn.ModuleList(make_block() for _ in range(prelude_layers))
        self.layers = nn.ModuleList(make_block() for _ in range(num_layers))
        self.coda = nn.ModuleList(make_block() for _ in range(coda_layers))
        self.final_norm = final_norm or nn.Identity()
        self.checkpoint_loops = checkpoint_loops

    def forward(
        self, h: Tensor, condition: Tensor | None = None, loops: int = 1, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Run the loop once and keep the state at each exit.

        Args:
            h: (B, T, D) embedded input.
            condition: (B, D) what the blocks are modulated by, or None.
            loops: L ≥ 1.
            exits: further loop counts, each in [1, loops], whose state is wanted.

        Returns:
            {r: (B, T, D)} for every r in ``exits`` and for ``loops``. The state at r equals a fresh pass with
            ``loops=r``.

        Raises:
            ValueError: loops below 1, or an exit outside [1, loops].
        """
        wanted = {*exits, loops}
        if loops < 1 or min(wanted) < 1 or max(wanted) > loops:
            raise ValueError(
                f"loops must be at least 1 and exits lie in [1, loops]: loops {loops}, exits {tuple(exits)}"
            )
        h = _apply(self.prelude, h, _modulations(self.prelude, condition))
        shared, coda = _modulations(self.layers, condition), _modulations(self.coda, condition)
        recompute = self.checkpoint_loops and self.training and torch.is_grad_enabled()
        states = {}
        for loop in range(1, loops + 1):
            if recompute:
                h = checkpoint(_apply, self.layers, h, shared, use_reentrant=False)
            else:
                h = _apply(self.layers, h, shared)
            if loop in wanted:
                states[loop] = self.final_norm(_apply(self.coda, h, coda))
        return states

    def effective_depth(self, loops: int) -> int:
        """D = N·L, prelude and coda added where there are any: the layers that one pass goes through."""
        return len(self.prelude) + loops * len(self.layers) + len(self.coda)

    def macs(self, num_tokens: int, loops: int) -> int:
        """Multiply–accumulates of one sample's pass with ``loops`` loops and no exit but the last."""

        def total(blocks: nn.ModuleList) -> int:
            return sum(block.macs(num_tokens) for block in blocks)  # type: ignore[operator]

        return total(self.prelude) + loops * total(self.layers) + total(self.coda)


def _modulations(blocks: nn.ModuleList, condition: Tensor | None) -> list[Any]:
    return [block.modulation(condition) for block in blocks]  # type: ignore[operator]


def _apply(blocks: nn.ModuleList, h: Tensor, modulations: list[Any]) -> Tensor:
    for block, modulation in zip(blocks, modulations, strict=True):
        h = block(h, modulation)
    return h

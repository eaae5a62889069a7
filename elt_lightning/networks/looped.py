"""The looped backbone F_(N,L)(x) = g(g(… g(x))): N shared layers g, applied L times (paper, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from elt_lightning.networks.blocks import Block
from elt_lightning.networks.recall import Recall, Recalled
from elt_lightning.networks.scales import check_sizes

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""How `torch.compile` works: its own names. The second and third replay CUDA graphs."""


class Layers(nn.ModuleList):
    """Blocks applied one after the other."""

    def modulations(self, condition: Tensor | None) -> list[Any]:
        """Derive from the condition (B, D) what each block needs and no loop changes."""
        return [block.modulation(condition) for block in self]  # type: ignore[operator]

    def forward(self, h: Tensor, modulations: list[Any], recalled: Recalled | None = None) -> Tensor:
        """Join h with what is recalled, if anything, and apply every block once: (B, T, D) to (B, T, D)."""
        if recalled is not None:
            h = recalled.join(h)
        for block, modulation in zip(self, modulations, strict=True):
            h = block(h, modulation)
        return h

    def macs(self, num_tokens: int) -> int:
        """Count the multiply–accumulates of one application to one sample."""
        return sum(block.macs(num_tokens) for block in self)  # type: ignore[operator]


class Begun(NamedTuple):
    """What a pass derives from its input once, before it loops.

    Attributes:
        h: (B, T, D) what the first loop is applied to.
        embedded: (B, T, D) the input after the prelude.
        shared: modulations of the layers inside the loop.
        coda: modulations of the layers after the loop.
        recalled: what every loop joins with its state, or None.
    """

    h: Tensor
    embedded: Tensor
    shared: list[Any]
    coda: list[Any]
    recalled: Recalled | None


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
        recall: how every loop reads the embedded input again; None for ELT's loop, which does not.
        activation_checkpointing: in training, keep only the state between loops and compute each loop again for its
            gradient.
            Memory no longer grows with layers times loops, a step takes about a third longer, gradients are the same.

    Raises:
        ValueError: no layer inside the loop, or a negative number around it.
    """

    def __init__(
        self,
        make_block: Callable[[], Block],
        num_layers: int,
        prelude_layers: int = 0,
        coda_layers: int = 0,
        final_norm: nn.Module | None = None,
        recall: Recall | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(1, num_layers=num_layers)
        check_sizes(0, prelude_layers=prelude_layers, coda_layers=coda_layers)
        self.prelude = Layers(make_block() for _ in range(prelude_layers))
        self.layers = Layers(make_block() for _ in range(num_layers))
        self.coda = Layers(make_block() for _ in range(coda_layers))
        self.final_norm = final_norm or nn.Identity()
        self.recall = recall
        self.activation_checkpointing = activation_checkpointing
        self._is_compiled = self._replays_graphs = False

    def compile_loop(self, mode: CompileMode = "default", **settings: Any) -> None:
        """Compile the body of one loop with `torch.compile`; names of weights and calls of the stack stay as they are.

        The loop itself is left to Python: compiling takes as long as N layers take, whatever L is, and no other loop
        count compiles anything again. Another batch size does (from the third on they share a compilation), and so does
        training after inference.

        Args:
            mode: of `torch.compile`. Those with CUDA graphs are for sampling few at a time on a GPU, which otherwise
                waits for operations to be launched.
            settings: further ones of `torch.compile`, for example ``backend``.
        """
        self._is_compiled, self._replays_graphs = True, mode in ("reduce-overhead", "max-autotune")
        for part in (self.prelude, self.layers, self.coda):
            if len(part):
                part.compile(mode=mode, **settings)

    def forward(
        self,
        h: Tensor,
        condition: Tensor | None = None,
        loops: int = 1,
        exits: Sequence[int] = (),
        state: Tensor | None = None,
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Run the loop once and keep what leaves at each exit.

        Args:
            h: (B, T, D) embedded input.
            condition: (B, D) what the blocks are modulated by, or None.
            loops: L ≥ 1.
            exits: further loop counts, each in [1, loops].
            state: (B, T, D) to begin the loop from, the second part of what an earlier pass returned; None to begin
                anew.

        Returns:
            {r: (B, T, D) after coda and final norm} for every r in ``exits`` and for ``loops``, each equal to that of
            a fresh pass with ``loops=r``; and the loop's state (B, T, D) at its end, before coda and final norm.

        Raises:
            ValueError: loops below 1, an exit outside [1, loops], or a state for a loop without recall.
        """
        wanted = {*exits, loops}
        if loops < 1 or min(wanted) < 1 or max(wanted) > loops:
            raise ValueError(
                f"loops must be at least 1 and exits lie in [1, loops]: loops {loops}, exits {tuple(exits)}"
            )
        if self._replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what one pass returns lives until the next one begins
        begun = self.begin(h, condition, state)
        h = begun.h
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        body, at_exits = self._body(h.device.type), {}
        for loop in range(1, loops + 1):
            arguments = h, begun.shared, begun.recalled
            h = checkpoint(body, *arguments, use_reentrant=False) if recompute else body(*arguments)
            if loop in wanted:
                at_exits[loop] = self.leave(h, begun)
        h = self.end(h, begun)
        return at_exits, h.clone() if self._replays_graphs else h

    def begin(self, h: Tensor, condition: Tensor | None, state: Tensor | None) -> Begun:
        """Go through the prelude, and derive what all loops need; arguments and errors as of :meth:`forward`."""
        if state is not None and self.recall is None:
            raise ValueError("a loop without recall would not see its input if it began from another pass's state")
        embedded = h = self.prelude(h, self.prelude.modulations(condition))
        shared, coda = self.layers.modulations(condition), self.coda.modulations(condition)
        if self.recall is None:
            return Begun(h, embedded, shared, coda, None)
        return Begun(self.recall.begin(embedded, state), embedded, shared, coda, self.recall.recalled(embedded))

    def leave(self, h: Tensor, begun: Begun) -> Tensor:
        """Return what leaves at an exit, (B, T, D): the state after coda and final norm."""
        return self.final_norm(self.coda(h, begun.coda))

    def end(self, h: Tensor, begun: Begun) -> Tensor:
        """Return the state (B, T, D) that another pass may begin from, given h after the last loop."""
        return h if self.recall is None else self.recall.end(begun.embedded, h)

    def _body(self, device_type: str) -> Callable[..., Tensor]:
        """Return the function that applies the shared layers once.

        In mixed precision autocast's cache casts each weight once for all loops, but does not reach into compiled code,
        where every loop would make and keep its own copies: there the weights are cast here.
        """
        if not (self._is_compiled and torch.is_autocast_enabled(device_type)):
            return self.layers
        dtype = torch.get_autocast_dtype(device_type)
        kernels = {name: weight.to(dtype) for name, weight in self.layers.named_parameters() if weight.ndim > 1}
        return lambda *arguments: functional_call(self.layers, kernels, arguments)

    def effective_depth(self, loops: int) -> int:
        """Return D = N·L plus prelude and coda: the layers that one pass goes through."""
        return len(self.prelude) + loops * len(self.layers) + len(self.coda)

    def macs(self, num_tokens: int, loops: int, num_exits: int = 1) -> int:
        """Return the multiply–accumulates of one sample's pass with ``loops`` loops, the last exit counted too."""
        ends = self.prelude.macs(num_tokens) + num_exits * self.coda.macs(num_tokens)
        return loops * self.layers.macs(num_tokens) + ends

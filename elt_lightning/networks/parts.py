"""A network as other programs run it: in three parts, or as one program whose loop count is an input.

The three parts are what happens once, one loop, and one exit. What loop and exit need of the input and the condition is
derived once and handed on as a list of tensors, the context. Inputs are tensors alone: x, labels, for diffusion the
time, with recall the state, where zero begins anew.

Letters: B batch, T tokens, D width, E exits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as map_over
from torch._higher_order_ops import while_loop
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.looped import Begun
from elt_lightning.processes.conditioning import Condition


class Embedding(nn.Module):
    """What happens once: embeddings, prelude, and what is derived from them, the modulations and what is recalled."""

    def __init__(self, network: LoopedNetwork) -> None:
        super().__init__()
        self.network = network

    def held(self, *inputs: Tensor) -> tuple[Tensor, Any, Any]:
        """Return h_0, and the contexts of loop and exit as nested tensors."""
        x, labels, *rest = inputs
        state = rest.pop() if self.network.has_recall else None
        begun, modulation = begin(self.network, x, Condition(labels, *rest), state)
        embedded = begun.embedded if self.network.has_recall else None
        return begun.h, (begun.shared, begun.recalled), (begun.coda, modulation, embedded)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return h_0 (B, T, D), the context of the loop and that of the exits."""
        h, of_loop, of_exit = self.held(*inputs)
        return h.clone(), _tensors(of_loop), _tensors(of_exit)  # an input may not be an output too


class Loop(nn.Module):
    """One loop: what is recalled is joined, and every shared layer applied once."""

    def __init__(self, network: LoopedNetwork, held: Any) -> None:
        super().__init__()
        self.network, self.held = network, _Nested(held)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the next h (B, T, D) for h and the loop's context."""
        h, *context = tensors
        return self.network.backbone.layers(h, *self.held.filled(context))


class Exit(nn.Module):
    """One exit: coda and head."""

    def __init__(self, network: LoopedNetwork, held: Any) -> None:
        super().__init__()
        self.network, self.held = network, _Nested(held)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction, and the state (B, T, D) to carry, for h (B, T, D) and the exits' context."""
        h, *context = tensors
        coda, modulation, embedded = self.held.filled(context)
        begun, backbone = Begun(h, embedded, [], coda, None), self.network.backbone
        return self.network.read_out(backbone.leave(h, begun), modulation), backbone.end(h, begun).clone()


class Parts(NamedTuple):
    """A network in three parts, which share its weights."""

    embedding: Embedding
    loop: Loop
    exit: Exit

    @torch.no_grad()
    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
        """Return what each part is called with when the first is called with these inputs."""
        h, of_loop, of_exit = self.embedding(*inputs)
        return inputs, (h, *of_loop), (h, *of_exit)


def parts_of(network: LoopedNetwork, inputs: tuple[Tensor, ...]) -> Parts:
    """Take a network in eval mode apart; ``inputs`` are examples of what :class:`Embedding` takes."""
    embedding = Embedding(network)
    with torch.no_grad():
        _, of_loop, of_exit = embedding.held(*inputs)
    return Parts(embedding, Loop(network, of_loop), Exit(network, of_exit))


class Program(nn.Module):
    """A whole pass, whose loop count and exits are tensors, so that one exported program runs any number of loops."""

    def __init__(self, network: LoopedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        loops: Tensor,
        exits: Tensor,
        time: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict at each exit.

        Args:
            x: (B, …) tokens or noisy latents.
            labels: (B,) int64.
            loops: () int64, L ≥ 1.
            exits: (E,) int64 in [1, L], whose predictions are wanted; elsewhere an error is raised.
            time: (B,) float for diffusion.
            state: (B, T, D) to begin the loop from, of a network with recall; zero begins anew.

        Returns:
            (E, B, …) predictions in the order of ``exits``, and the state (B, T, D) after the last loop.
        """
        torch._assert_async(((exits >= 1) & (exits <= loops)).all(), "exits must lie in [1, loops]")
        # What loops take from around them may not share memory, as chunks of one tensor do.
        begun, modulation = tree_map_only(Tensor, Tensor.clone, begin(self.network, x, Condition(labels, time), state))
        backbone, places = self.network.backbone, exits.view(-1, 1, 1, 1)

        def loop(count: Tensor, h: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            count, h = count + 1, backbone.layers(h, begun.shared, begun.recalled)
            return count, h, torch.where(places == count, h, kept)

        first = torch.zeros_like(loops), begun.h, begun.h.new_zeros(exits.shape[0], *begun.h.shape)
        _, h, kept = while_loop(lambda count, *_: count < loops, loop, first)

        def leave(h: Tensor, *_: Any) -> Tensor:
            return self.network.read_out(backbone.leave(h, begun), modulation)

        return map_over(leave, kept), backbone.end(h, begun)


def begin(network: LoopedNetwork, x: Tensor, condition: Condition, state: Tensor | None) -> tuple[Begun, Any]:
    """Do what a pass does once; return it, and the head's modulation."""
    h, embedded = network.embed(x, condition)
    return network.backbone.begin(h, embedded, state), network.head_modulation(embedded)


class _Nested:
    """How nested tensors, some of them None, are made of a flat list."""

    def __init__(self, example: Any) -> None:
        leaves, self.spec = tree_flatten(example)
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def filled(self, tensors: list[Tensor]) -> Any:
        rest = iter(tensors)
        return tree_unflatten([next(rest) if here else None for here in self.is_tensor], self.spec)


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(nested)[0] if isinstance(leaf, Tensor)]

"""What loops do to the state in validation: whether tokens grow alike, and whether the last loop still changes much."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from elt_lightning.networks.blocks import PostNormBlock
from elt_lightning.training.module import ELTModule

ALIKE = 0.95
"""Mean cosine between tokens from which they count as alike. Trained models stay below 0.7 at the loops of training;
narrow post-norm stacks that stand still are above 0.98 after 100 steps (docs/small_scale.md)."""


def relative_distance(h: Tensor, to: Tensor) -> Tensor:
    """Return ‖h − to‖/‖to‖ of states (B, T, D), averaged over tokens and samples."""
    return ((h - to).norm(dim=-1) / to.norm(dim=-1)).mean()


def token_cosine(h: Tensor) -> Tensor:
    """Return the cosine between two tokens of a sample, averaged over all pairs and samples of h (B, T, D)."""
    units, count = nn.functional.normalize(h, dim=-1), h.shape[1]
    return ((units.sum(1).square().sum(-1) - count) / (count * (count - 1))).mean()


@contextmanager
def followed_loops(layers: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect, loop after loop of the shared layers, the relative update of the state and the cosine between tokens."""
    updates: list[Tensor] = []
    cosines: list[Tensor] = []

    def after_loop(_: nn.Module, arguments: tuple[Tensor, ...], h: Tensor) -> None:
        updates.append(relative_distance(arguments[0].float(), h.float()))
        cosines.append(token_cosine(h.float()))

    hook = layers.register_forward_hook(after_loop)
    try:
        yield updates, cosines
    finally:
        hook.remove()


class LoopMonitor(Callback):
    """Log in validation, for each loop of its first batch, ``loops/update@L…`` and ``loops/token_cosine@L…``.

    The first, ‖h_l − h_(l−1)‖/‖h_l‖, tells at the last loop whether more loops would still change anything. The second
    goes to 1 where tokens grow alike, and attention has nothing left to tell apart: a warning names the setting to
    change. A compiled loop is not followed.
    """

    def __init__(self) -> None:
        self._following = ExitStack()
        self._found: tuple[list[Tensor], list[Tensor]] = ([], [])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Follow the loops of the first batch."""
        module = cast(ELTModule, pl_module)
        if batch_idx == 0:
            layers = module.network.backbone.layers
            self._found = ([], []) if module.compile_mode else self._following.enter_context(followed_loops(layers))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Let go of the network."""
        self._following.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was found, averaged over devices, and warn where tokens have grown alike."""
        module, (updates, cosines) = cast(ELTModule, pl_module), self._found
        if not updates or cosines[0].isnan():  # a single token has none to be like
            return
        for name, values in (("update", updates), ("token_cosine", cosines)):
            module.log_dict({f"loops/{name}@L{loop}": value for loop, value in enumerate(values, 1)}, sync_dist=True)
        loops = min(module.max_loops, len(cosines))
        if float(cosines[loops - 1]) > ALIKE and not trainer.sanity_checking:
            rank_zero_warn(alike_line(module, loops, float(cosines[loops - 1])))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the network."""
        self._following.close()


def alike_line(module: ELTModule, loops: int, cosine: float) -> str:
    """Return the warning, which names the settings that help this network."""
    scales = [block.residual_scale for block in module.network.modules() if isinstance(block, PostNormBlock)]
    settings = [
        *(["model.network.init_args.residual_scale to 3"] if scales and max(scales) < 3 else []),
        *([] if module.network.has_recall else ["model.network.init_args.recall to true"]),
    ] or ["model.optimizer.init_args.lr lower"]
    return (
        f"tokens have grown alike: mean cosine {cosine:.2f} after {loops} loops, and attention has nothing to tell "
        f"apart; if the loss stands still, set {' or '.join(settings)} (docs/small_scale.md)"
    )

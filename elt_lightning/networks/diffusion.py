"""The looped diffusion transformer: DiT with its layers shared over loops."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.embeddings import TimeClassEmbedding, patchify, sine_positions, unpatchify
from elt_lightning.networks.looped import LoopedStack
from elt_lightning.networks.modulated_blocks import AdaptiveNormBlock, FiLMBlock, ModulatedBlock
from elt_lightning.networks.recall import ResidualRecall
from elt_lightning.networks.scales import check_possible, check_sizes, layer_shape
from elt_lightning.processes.conditioning import Condition

BLOCKS: dict[str, type[AdaptiveNormBlock] | type[FiLMBlock]] = {"adaln_zero": AdaptiveNormBlock, "film": FiLMBlock}


class LoopedDiT(LoopedNetwork):
    """Predict from a noisy image or video what the process asks for, after any number of loops, with one head.

    Source: facebookresearch/DiT around the paper's loop F_(N,L). Run with one loop it is DiT itself, N layers deep,
    whose weights `elt import` reads. At the start of training every exit predicts zero.

    Letters: B batch, C channels, H W height and width, F frames, T tokens, D width.

    Args:
        input_shape: (channels, height, width) or (channels, frames, height, width) of one sample.
        num_classes: number of classes; class ``num_classes`` is the null class.
        num_layers: N, the unique layers inside the loop.
        patch_size: side of a patch, one number for all axes or one for each.
        scale: one of the named sizes S, B, L, XL, H, G, wide; or give width and num_heads.
        width: D.
        num_heads: attention heads.
        mlp_width: hidden units of the MLP; four times the width unless given.
        block: "adaln_zero" as in DiT, or "film" as in "simple diffusion", which the paper's Table 2 points to.
        condition_width: width of the time and class embedding; D unless given. Table 2 points to 1024.
        positions: "sine" for a fixed table, "learned" for a trained one.
        prelude_layers: layers before the loop; ELT has none.
        coda_layers: layers after the loop; ELT has none.
        out_channels: channels of the output; C unless given. DiT's published networks have 2·C, half of them for a
            variance, which alone :class:`~elt_lightning.objectives.ddpm.DDPMObjective` trains and
            :class:`~elt_lightning.samplers.diffusion.DDPMSampler` can use.
        activation_checkpointing: save memory in training by computing each loop again for its gradient.
        recall: every loop reads the embedded input again, as :class:`~elt_lightning.networks.recall.ResidualRecall`
            says: D parameters more, and loops beyond those of training go on refining. ELT has none.
        class_std: standard deviation of the class table's initial weights; DiT has 0.02, which suits long trainings of
            wide networks. With it a few hundred steps barely teach the class; with 1 they do.
        time_scale: what times in [0, 1] are multiplied by before they are embedded: 1000 as in DiT, 1 as in SiT.

    Raises:
        ValueError: the patch does not divide the input, a size is not what it may be, or a choice is unknown.
    """

    positions: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        num_layers: int,
        patch_size: int | tuple[int, ...] = 2,
        scale: str | None = None,
        width: int | None = None,
        num_heads: int | None = None,
        mlp_width: int | None = None,
        block: Literal["adaln_zero", "film"] = "adaln_zero",
        condition_width: int | None = None,
        positions: Literal["sine", "learned"] = "sine",
        prelude_layers: int = 0,
        coda_layers: int = 0,
        out_channels: int | None = None,
        activation_checkpointing: bool = False,
        recall: bool = False,
        class_std: float = 0.02,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        width, num_heads, mlp_width = layer_shape(scale, width, num_heads, mlp_width)
        check_possible(num_layers, width, mlp_width)
        check_sizes(1, condition_width=condition_width)
        if not 0 <= class_std < math.inf:
            raise ValueError(f"class_std must be at least 0 and finite, not {class_std}")
        if not 0 < time_scale < math.inf:
            raise ValueError(f"time_scale must be above 0 and finite, not {time_scale}")
        condition_width = condition_width or width
        if len(input_shape) < 3:
            raise ValueError(f"latents have channels, height and width; {tuple(input_shape)} is a grid of tokens")
        channels, *size = input_shape
        if out_channels not in (None, channels, 2 * channels):
            raise ValueError(f"out_channels must be {channels}, or with a variance {2 * channels}, not {out_channels}")
        self.width, self.input_shape = width, tuple(input_shape)
        self.sample_shape = self.input_shape
        self.patch = (patch_size,) * len(size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(self.patch) != len(size) or any(p < 1 or n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(
                f"patch_size {patch_size} does not divide an input of shape {tuple(input_shape)}: it must be a number "
                f"from 1 up that divides {size}, or one such number for each"
            )
        if block not in BLOCKS or positions not in ("sine", "learned"):
            raise ValueError(
                f"need block from {', '.join(BLOCKS)} and positions sine or learned, not {block}, {positions}"
            )
        self.grid = tuple(n // p for n, p in zip(size, self.patch, strict=True))
        patch_volume = math.prod(self.patch)
        self.embedding = nn.Linear(channels * patch_volume, width)
        table = sine_positions(self.grid, width)
        if positions == "sine":
            self.register_buffer("positions", table, persistent=False)
        else:
            self.positions = nn.Parameter(table)
        self.condition = TimeClassEmbedding(num_classes, condition_width, time_scale)
        self.backbone = LoopedStack(
            lambda: BLOCKS[block](width, num_heads, mlp_width, condition_width),
            num_layers,
            prelude_layers,
            coda_layers,
            recall=ResidualRecall(width) if recall else None,
            activation_checkpointing=activation_checkpointing,
        )
        self.head = OutputHead(
            width, (out_channels or channels) * patch_volume, condition_width if block == "adaln_zero" else None
        )
        self._initialise(class_std, learned_positions=positions == "learned")

    def _initialise(self, class_std: float, learned_positions: bool) -> None:
        """Initialise as DiT does; every block begins as the identity, every prediction as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.condition.classes.weight, std=class_std)
        for layer in (self.condition.time_in, self.condition.time_out):
            nn.init.normal_(layer.weight, std=0.02)
        if learned_positions:
            nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, ModulatedBlock | OutputHead):
                module.start_as_identity()

    def embed(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Embed x (B, C, H, W) or (B, C, F, H, W) as patches, and times with labels."""
        h = self.embedding(patchify(x.to(self.embedding.weight.dtype), self.patch)) + self.positions
        return h, self.condition(condition)

    def head_modulation(self, condition: Tensor | None) -> tuple[Tensor, ...] | None:
        """Make the shift and scale of the head's norm, if it has them."""
        assert condition is not None
        return self.head.modulation(condition)

    def read_out(self, h: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        """Predict (B, out_channels, …) in the input's shape."""
        return unpatchify(self.head(h, modulation), self.grid, self.patch)

    def macs(self, loops: int, exits: Sequence[int] = ()) -> int:
        """Return the multiply–accumulates of one forward pass of one sample, attention products included."""
        num_tokens, num_exits = math.prod(self.grid), len({*exits, loops})
        once = [block.modulation_macs() for block in self.backbone.modules() if isinstance(block, ModulatedBlock)]
        embed = num_tokens * self.embedding.in_features * self.embedding.out_features
        loop = self.backbone.macs(num_tokens, loops, num_exits)
        return self.condition.macs() + sum(once) + embed + loop + self.head.macs(num_exits * num_tokens)


class OutputHead(nn.Module):
    """Norm and linear layer from states to patches; with a condition the norm is adaptive, as in DiT's final layer.

    Args:
        width: D.
        out_features: values of an output patch.
        condition_width: width of the condition, or None for a norm with learned weights.
    """

    def __init__(self, width: int, out_features: int, condition_width: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=condition_width is None)
        self.modulate = None if condition_width is None else nn.Linear(condition_width, 2 * width)
        self.linear = nn.Linear(width, out_features)

    def start_as_identity(self) -> None:
        """Begin with predictions of zero and an unmodulated norm."""
        for layer in (self.linear, self.modulate):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...] | None:
        """Make shift and scale, each (B, 1, D), from the condition (B, condition width), or nothing."""
        return None if self.modulate is None else self.modulate(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)

    def forward(self, h: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        """Turn a state (B, T, D) into patches (B, T, out_features)."""
        h = self.norm(h)
        if modulation is not None:
            shift, scale = modulation
            h = torch.addcmul(shift, h, 1 + scale)
        return self.linear(h)

    def macs(self, num_tokens: int) -> int:
        """Return the multiply–accumulates for one sample, the modulation included; tokens of all exits count."""
        modulate = 0 if self.modulate is None else self.modulate.in_features * self.modulate.out_features
        return num_tokens * self.linear.in_features * self.linear.out_features + modulate

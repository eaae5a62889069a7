"""The looped masked transformer: MaskGIT's network with its layers shared over loops."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.blocks import PostNormBlock
from elt_lightning.networks.embeddings import MaskedTokenEmbedding, initialise_truncated_normal
from elt_lightning.networks.looped import LoopedStack
from elt_lightning.networks.recall import AdditiveRecall
from elt_lightning.networks.scales import check_possible, layer_shape
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.masking import check_codebook


class LoopedMaskedTransformer(LoopedNetwork):
    """Predict every token of a partly masked image or video, after any number of loops, with one head for all of them.

    Source: MaskGIT's bidirectional transformer (google-research/maskgit, ``nets/maskgit_transformer.py``): post-norm
    layers, learned positions, truncated normal initialisation, and the head dense → GELU → layer norm → tied token
    embedding + bias. The loop is the paper's F_(N,L).

    Letters: B batch, T tokens, D width, V codes.

    Args:
        codebook_size: V, size of the tokenizer's codebook.
        input_shape: the token grid, (height, width) or (frames, height, width); T is its product.
        num_classes: number of classes; class ``num_classes`` is the null class.
        num_layers: N, the unique layers inside the loop.
        scale: one of the paper's sizes B, L, XL, H, G; or give width and num_heads.
        width: D.
        num_heads: attention heads.
        mlp_width: hidden units of the MLP; four times the width unless given.
        dropout: MaskGIT and MAGVIT use 0.1.
        prelude_layers: layers before the loop; ELT has none.
        coda_layers: layers after the loop; ELT has none.
        activation_checkpointing: recompute each loop's activations in the backward pass: less memory, more time.
        recall: every loop reads the embedded tokens again, as :class:`~elt_lightning.networks.recall.AdditiveRecall`
            says: one parameter more, and loops beyond those of training go on refining. ELT has none.
        residual_scale: see :class:`~elt_lightning.networks.blocks.PostNormBlock`; MaskGIT has 1.
        initial_std: standard deviation of the initial weights; MaskGIT has 0.02, which suits widths near a thousand.
    """

    def __init__(
        self,
        codebook_size: int,
        input_shape: tuple[int, ...],
        num_classes: int,
        num_layers: int,
        scale: str | None = None,
        width: int | None = None,
        num_heads: int | None = None,
        mlp_width: int | None = None,
        dropout: float = 0.0,
        prelude_layers: int = 0,
        coda_layers: int = 0,
        activation_checkpointing: bool = False,
        recall: bool = False,
        residual_scale: float = 1.0,
        initial_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_codebook(codebook_size)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        if not (0 < residual_scale < math.inf and 0 < initial_std < math.inf):
            raise ValueError(
                f"residual_scale and initial_std must be above 0 and finite, not {residual_scale} and {initial_std}"
            )
        width, num_heads, mlp_width = layer_shape(scale, width, num_heads, mlp_width)
        check_possible(num_layers, width, mlp_width)
        self.width, self.input_shape = width, tuple(input_shape)
        self.sample_shape = (math.prod(input_shape),)
        self.embedding = MaskedTokenEmbedding(codebook_size, *self.sample_shape, num_classes, width, dropout)
        self.backbone = LoopedStack(
            lambda: PostNormBlock(width, num_heads, mlp_width, dropout, residual_scale),
            num_layers,
            prelude_layers,
            coda_layers,
            recall=AdditiveRecall() if recall else None,
            activation_checkpointing=activation_checkpointing,
        )
        self.head_dense = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=1e-12)
        self.head_bias = Parameter(self.head_dense.bias.new_zeros(codebook_size))
        initialise_truncated_normal(self, initial_std)

    def embed(self, x: Tensor, condition: Condition) -> tuple[Tensor, None]:
        """Embed tokens x (B, T) int64 in [0, V], V being the mask token, class token first: (B, 1 + T, D)."""
        return self.embedding(x, condition.labels), None

    def read_out(self, h: Tensor, modulation: None = None) -> Tensor:
        """Turn a state (B, 1 + T, D), class token first, into logits (B, T, V)."""
        h = self.head_norm(F.gelu(self.head_dense(h[:, 1:]), approximate="tanh"))
        return F.linear(h, self.embedding.tokens.weight[:-1], self.head_bias)  # the last row is the mask token's

    def macs(self, loops: int, exits: Sequence[int] = ()) -> int:
        """Return the multiply–accumulates of one forward pass of one sample, attention products included."""
        num_tokens, width = self.sample_shape[0], self.head_dense.in_features
        head = num_tokens * (width**2 + width * len(self.head_bias))
        num_exits = len({*exits, loops})
        return self.backbone.macs(1 + num_tokens, loops, num_exits) + num_exits * head

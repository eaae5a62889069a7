"""Embeddings, which stand outside the loop and are applied once."""

import torch
from torch import Tensor, nn


def initialise_truncated_normal(module: nn.Module, std: float = 0.02) -> None:
    """Initialise linear layers and embeddings as MaskGIT does: normal, cut at two standard deviations; biases zero.

    To be used as ``network.apply(initialise_truncated_normal)``.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class MaskedTokenEmbedding(nn.Module):
    """Class token first, then the tokens; a learned position added to each; layer norm and dropout (MaskGIT, BERT).

    Images and videos differ in the number of tokens alone: MaskGIT and MAGVIT learn one flat table of positions, in
    row-major order over (height, width) or (frames, height, width).

    Args:
        num_codes: V; row V of the token table is the mask token.
        num_tokens: T.
        num_classes: row ``num_classes`` of the class table is the null class.
        width: D.
        dropout: after the layer norm.
    """

    def __init__(self, num_codes: int, num_tokens: int, num_classes: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_codes + 1, width)
        self.classes = nn.Embedding(num_classes + 1, width)
        self.positions = nn.Embedding(1 + num_tokens, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Embed: tokens (B, T) in [0, V], labels (B,) in [0, num_classes], to (B, 1 + T, D)."""
        h = torch.cat([self.classes(labels)[:, None], self.tokens(tokens)], dim=1)
        return self.dropout(self.norm(h + self.positions.weight))

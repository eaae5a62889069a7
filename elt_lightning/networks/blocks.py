"""Transformer blocks, and what a looped stack asks of them.

- ``modulation(condition)``: what the block derives from the condition, computed once per pass however often it loops;
- ``forward(h, modulation)``: one application.

Letters: B batch, T tokens, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """What a looped stack is made of."""

    def modulation(self, condition: Tensor | None) -> Any:
        """Derive from the condition (B, D) what does not change from loop to loop; nothing by default."""
        return None

    def macs(self, num_tokens: int) -> int:
        """Count the multiply–accumulates of one application to ``num_tokens`` tokens, attention included."""
        raise NotImplementedError


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, through torch's fused kernel: (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        # Chunks of the last axis, whose gradients are joined where the product's backward pass reads them.
        # Each is B heads T D/heads.
        chunks = self.query_key_value(h).chunk(3, dim=-1)
        query, key, value = (chunk.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for chunk in chunks)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).flatten(2))

    def macs(self, num_tokens: int) -> int:
        """Count four projections, and the two products QKᵀ and PV."""
        width = self.output.in_features
        return 4 * num_tokens * width**2 + 2 * num_tokens**2 * width


class PostNormBlock(Block):
    """BERT's layer as MaskGIT uses it: attention, add, normalise; MLP with tanh-GELU, add, normalise.

    Source: google-research/maskgit, ``nets/maskgit_transformer.py``. Parameters: 12·D² + 13·D for an MLP of 4·D.

    Args:
        width: D.
        num_heads: attention heads; must divide the width.
        mlp_width: hidden units of the MLP.
        dropout: on attention weights and on both residual branches.
        residual_scale: α of DeepNet (Wang et al. 2022, arXiv 2203.00555): norm(α·h + f(h)). MaskGIT has 1. Above 1 it
            keeps tokens apart when a narrow stack is applied many times: with 1 their states can grow alike in the
            first hundred steps; attention then cannot tell them apart, and training stalls.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, dropout: float = 0.0, residual_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.attention = SelfAttention(width, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, modulation: None = None) -> Tensor:
        """Apply the layer: (B, T, D) to (B, T, D)."""
        h = self.attention_norm(torch.add(self.dropout(self.attention(h)), h, alpha=self.residual_scale))
        mlp = self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))
        return self.mlp_norm(torch.add(self.dropout(mlp), h, alpha=self.residual_scale))

    def macs(self, num_tokens: int) -> int:  # noqa: D102
        mlp = 2 * self.mlp_in.in_features * self.mlp_in.out_features
        return self.attention.macs(num_tokens) + num_tokens * mlp

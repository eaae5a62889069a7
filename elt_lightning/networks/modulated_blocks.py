"""Pre-norm transformer blocks that are told the time and the class: adaLN-Zero (DiT) and FiLM ("simple diffusion").

Letters: B batch, T tokens, D width, M hidden units of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.networks.blocks import Block, SelfAttention


class ModulatedBlock(Block):
    """A block whose condition goes through one linear layer; that layer is called once per pass, not once per loop.

    Args:
        width: D.
        mlp_width: M.
        condition_width: width of the condition.
        num_modulations: numbers that the linear layer makes for each sample.
        attention: self-attention over (B, T, D).
    """

    def __init__(
        self, width: int, mlp_width: int, condition_width: int, num_modulations: int, attention: SelfAttention
    ) -> None:
        super().__init__()
        self.attention = attention
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.modulate = nn.Linear(condition_width, num_modulations)

    def start_as_identity(self) -> None:
        """Zero what stands last on each residual branch, so that the untrained block returns its input."""
        raise NotImplementedError

    def macs(self, num_tokens: int) -> int:
        """Count the multiply–accumulates of one application; those once per pass are in :meth:`modulation_macs`."""
        return self.attention.macs(num_tokens) + 2 * num_tokens * self.mlp_in.in_features * self.mlp_in.out_features

    def modulation_macs(self) -> int:
        """Count the multiply–accumulates of :meth:`modulation` for one sample."""
        return self.modulate.in_features * self.modulate.out_features


class AdaptiveNormBlock(ModulatedBlock):
    """DiT's adaLN-Zero layer: h + gate·attention(norm(h)·(1 + scale) + shift), then the same with an MLP.

    Source: Peebles and Xie 2023 (facebookresearch/DiT, ``models.py``). The norms have no weights of their own; shift,
    scale and gate of both branches are linear in SiLU(condition), in the order shift, scale, gate of attention, then of
    the MLP. Parameters for a condition of width D and an MLP of 4·D: 18·D² + 15·D.

    Args:
        width: D.
        num_heads: attention heads.
        mlp_width: hidden units of the MLP, with tanh-GELU.
        condition_width: width of the condition; D in DiT.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, condition_width: int) -> None:
        super().__init__(width, mlp_width, condition_width, 6 * width, SelfAttention(width, num_heads))
        self.attention_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def start_as_identity(self) -> None:
        """Zero the modulation, gates included."""
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def modulation(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Make the six modulations, each (B, 1, D), from the condition (B, condition width); scales have a 1 added."""
        made = self.modulate(F.silu(_required(condition))).unsqueeze(1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = made.chunk(6, dim=-1)
        return shift, 1 + scale, gate, mlp_shift, 1 + mlp_scale, mlp_gate

    def forward(self, h: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Apply the layer: (B, T, D) to (B, T, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        h = torch.addcmul(h, gate, self.attention(torch.addcmul(shift, self.attention_norm(h), scale)))
        hidden = self.mlp_in(torch.addcmul(mlp_shift, self.mlp_norm(h), mlp_scale))
        return torch.addcmul(h, mlp_gate, self.mlp_out(F.gelu(hidden, approximate="tanh")))


class QKNormAttention(SelfAttention):
    """Self-attention with queries and keys layer-normalised within each head, so that their products stay bounded."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.query_norm = nn.LayerNorm(width // num_heads, eps=1e-6)
        self.key_norm = nn.LayerNorm(width // num_heads, eps=1e-6)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        qkv = self.query_key_value(h).unflatten(-1, (3, self.num_heads, -1))  # B T 3 heads D/heads
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B heads T D/heads
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        return self.output(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FiLMBlock(ModulatedBlock):
    """The transformer layer of "simple diffusion": the condition scales and shifts the MLP's hidden units (FiLM).

    Source: Hoogeboom, Heek and Salimans 2023 (arXiv 2301.11093, appendix): norms with a scale and no bias, normalised
    queries and keys, SiLU, then hidden·(1 + scale) + shift, and zeros at the start in the last layer of both branches.
    That ELT's diffusion transformer uses this block is inferred from the parameter counts of its Table 2. The order,
    attention before MLP, is that of the other blocks here. Parameters, without norms and biases:
    4·D² + 2·D·M + 2·M·condition width.

    Args:
        width: D.
        num_heads: attention heads.
        mlp_width: M.
        condition_width: width of the condition; 1024 explains Table 2.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, condition_width: int) -> None:
        super().__init__(width, mlp_width, condition_width, 2 * mlp_width, QKNormAttention(width, num_heads))
        self.attention_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6, bias=False)

    def start_as_identity(self) -> None:
        """Zero the last layer of both branches; unlike gates, they can grow without the condition's help."""
        nn.init.zeros_(self.attention.output.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def modulation(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Make scale, with a 1 added, and shift of the hidden units, each (B, 1, M), from the condition."""
        scale, shift = self.modulate(F.silu(_required(condition))).unsqueeze(1).chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, h: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Apply the layer: (B, T, D) to (B, T, D)."""
        scale, shift = modulation
        h = h + self.attention(self.attention_norm(h))
        return h + self.mlp_out(torch.addcmul(shift, F.silu(self.mlp_in(self.mlp_norm(h))), scale))


def _required(condition: Tensor | None) -> Tensor:
    if condition is None:
        raise ValueError("a modulated block needs a condition")
    return condition

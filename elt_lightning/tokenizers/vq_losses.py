"""The losses of MAGVIT's tokenizer: github.com/google-research/magvit, videogvt/train_lib/losses.py, models/vqvae.py.

Letters: B batch, N vectors in a batch, V codes, D channels of a code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.tokenizers.vq_network import Quantized


def codebook_loss(quantized: Quantized) -> Tensor:
    """Pull the codes towards the vectors that chose them: the mean of (sg[v] − c)² over N and D."""
    return F.mse_loss(quantized.chosen, quantized.vectors.detach())


def commitment_loss(quantized: Quantized) -> Tensor:
    """Pull the vectors towards the codes they chose: the mean of (v − sg[c])² over N and D."""
    return F.mse_loss(quantized.vectors, quantized.chosen.detach())


def entropy_loss(distances: Tensor, temperature: float) -> Tensor:
    """Make each vector sure of its code and all vectors together use every code.

    With p = softmax(−distances / temperature): the mean over N of H(p), less H(mean over N of p). Lies in about
    [−log V, 0]. As in the source, 10⁻⁵ keeps the second logarithm finite.

    Args:
        distances: (N, V) squared distances.
        temperature: of the softmax. MAGVIT: 0.01.
    """
    log_probabilities = F.log_softmax(-distances / temperature, 1)
    probabilities = log_probabilities.exp()
    mean = probabilities.mean(0)
    each = -(probabilities * log_probabilities).sum(1).mean()
    return each + (mean * torch.log(mean + 1e-5)).sum()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the non-saturating loss of what should pass for real: the mean of −log sigmoid(D(fake)); logits (B, 1)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the loss of telling real from fake: means of −log σ(D(real)) and −log σ(−D(fake)); logits (B, 1)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: Tensor, pixels: Tensor) -> Tensor:
    """Return the squared norm of the discriminator's gradient at real pixels, averaged over B; differentiable.

    MAGVIT's weight of it is 10, without the factor ½ of Mescheder et al. 2018 (arXiv:1801.04406).

    Args:
        real_logits: (B, 1), computed from ``pixels``, each sample's from its own pixels alone.
        pixels: (B, …), which require gradients.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), pixels, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def perplexity(counts: Tensor) -> Tensor:
    """Return how many codes are in even use: exp of the entropy of counts (V,), in [1, V]; 1 where all counts are 0."""
    shares = counts / counts.sum().clamp(min=1)
    return torch.special.entr(shares).sum().exp()

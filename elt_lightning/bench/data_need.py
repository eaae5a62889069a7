"""How much of what is read one GPU would take in, by counting what a training step computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.tokenizers.vq_training import VQTraining

FLOPS_PER_SECOND = 0.5 * 989e12
"""What one H100 or H200 is taken to do in training: half of its published peak in dense bf16."""


def masked_need() -> float:
    """Return the training images per second that one GPU takes of the paper's scale L, at 24 layers passed through."""
    return _need(3, lambda: LoopedMaskedTransformer(1024, (16, 16), 1000, num_layers=8, scale="L"))


def diffusion_need() -> float:
    """Return the same for the paper's diffusion models, at 32 layers passed through."""
    settings: dict[str, Any] = {"scale": "wide", "block": "film", "condition_width": 1024}
    return _need(4, lambda: LoopedDiT((4, 32, 32), 1000, 8, 2, **settings))


def video_need() -> float:
    """Return the clips per second that one GPU trains configs/ucf101/elt_6n4l.yaml on, at 24 layers passed through."""
    return _need(4, lambda: LoopedMaskedTransformer(1024, (4, 16, 16), 101, num_layers=6, scale="L"))


def _need(loops: int, build: Callable[[], LoopedNetwork]) -> float:
    with torch.device("meta"):
        return FLOPS_PER_SECOND / flops_per_training_image(build().macs(loops))


def flops_per_training_image(macs: int) -> int:
    """Count two operations to a multiply–accumulate, three forward passes to a step: backward counts twice."""
    return 2 * 3 * macs


def tokenizer_need() -> float:
    """Return at most how many clips/s one GPU trains the 3D-VQ tokenizer on, configs/ucf101/tokenizer.yaml.

    A forward pass of one clip takes A = 4.45·10¹² operations in the autoencoder and D = 0.13·10¹² in the discriminator,
    as torch counts convolutions and products. A step takes 3·A + 8·D = 14.4·10¹²: the autoencoder as every network; the
    discriminator for the autoencoder, whose gradient passes through it and stops at no weight of it (2·D), and for
    itself on the clip and on its reconstruction (3·D each). Left out are the penalty in every sixteenth step (0.2 %),
    the products of the quantiser (0.01 %) and everything that is not a product.

    One clip is taken in at 494 / 14.4 = 34 per second, if 3-D convolutions reached half of a GPU's peak as the
    transformers' products may. They reach less, and a GPU takes fewer.
    """
    with torch.device("meta"):
        training, clip = VQTraining((16, 128, 128), filters=128), torch.empty(1, 3, 16, 128, 128)
    network, discriminator = training.network, training.discriminator
    assert discriminator is not None
    autoencoder = count_flops(lambda: network.decoder(network.encoder(clip)))
    return FLOPS_PER_SECOND / (3 * autoencoder + 8 * count_flops(lambda: discriminator(clip)))


@torch.no_grad()
def count_flops(work: Callable[[], object]) -> int:
    """Count the operations of convolutions and matrix products, two to a multiply–accumulate."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()

"""TorchScript files with the signatures of the published I3D and C3D, but small."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallI3D(nn.Module):
    """Takes what the published file takes; features are a fixed mixture of 36 averages."""

    def __init__(self, seed: int = 0, num_features: int = 400) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(36, num_features, generator=generator))

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        x = x.float()
        if resize:
            x = F.interpolate(x, size=[x.shape[2], 16, 16], mode="trilinear", align_corners=False)
        if rescale:
            x = x * (2 / 255) - 1
        x = F.adaptive_avg_pool3d(x, [3, 2, 2]).flatten(1) @ self.mix
        return x if return_features else x.softmax(1)


class SmallC3D(nn.Module):
    """Gives class probabilities of RGB bytes."""

    def __init__(self, seed: int = 0, num_classes: int = 101) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(36, num_classes, generator=generator) / 500)

    def forward(self, x: Tensor) -> Tensor:
        return (F.adaptive_avg_pool3d(x.float(), [3, 2, 2]).flatten(1) @ self.mix).softmax(1)


def write_network(path: Path, network: nn.Module) -> Path:
    """Write a network as a TorchScript file."""
    torch.jit.script(network.eval()).save(str(path))
    return path

"""Small networks that judge samples of data without a published network: trained here once, seeded, and kept."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elt_lightning.files import is_file, written_aside

Network = TypeVar("Network", bound="FeatureNetwork")


class FeatureNetwork(nn.Module):
    """Name the class of what it reads, by one linear layer, ``classifier``, over features that distances compare."""

    num_features = 64
    classifier: nn.Linear

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Return the features before the last layer: (n, …) to (n, ``num_features``)."""

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        return self.classifier(self.features(pixels))


def load_or_train(
    network: Network,
    path: Path,
    train: Callable[[Network, Tensor, Tensor], None],
    data: Callable[[bool], tuple[Tensor, Tensor]],
    made: str,
) -> Network:
    """Load a network from its cache, or train it once and write the cache; return it frozen, in eval mode.

    Args:
        network: of any weights.
        path: the cached file; what is trained on other data takes another one.
        train: trains it in place on what it reads and the labels.
        data: returns these for training, or of what is held out.
        made: printed once it is trained, with the share of what is held out that it reads in place of ``{}``.
    """
    if not is_file(path):
        train(network, *data(False))
        held_out, labels = data(True)
        with torch.no_grad():
            accuracy = float((network(held_out).argmax(1) == labels).float().mean())
        with written_aside(path) as aside:
            save_file(network.state_dict(), aside)
        print(f"made {path}: {made.format(accuracy)}", flush=True)
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def fit(
    network: nn.Module,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> None:
    """Train a network from new on batches of what it reads and their labels, which ``draw`` returns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                module.reset_parameters()
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
        for _ in range(steps):
            images, labels = draw(generator)
            loss = F.cross_entropy(network(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

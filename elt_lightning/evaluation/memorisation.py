"""Whether a model remembers what it was trained on: samples beside the training samples nearest to them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from elt_lightning.data.base import GenerativeDataModule
from elt_lightning.evaluation.pictures import nearest_figure, write_figure
from elt_lightning.files import write_json
from elt_lightning.metrics.nearest import Nearest, nearest_items
from elt_lightning.training.meter import counted


@torch.inference_mode()
def write_nearest(folder: Path, loops: int, samples: Tensor, data: GenerativeDataModule, batch_size: int) -> None:
    """Write ``nearest.png`` and ``nearest.json``: samples, and what they are nearest to of all training samples.

    Distances are mean squared differences of pixels in [0, 1], between decoded samples on both sides, so that a sample
    of memorised codes is at 0. For comparison, the JSON has the distances of as many held-out samples: those of a model
    that draws new ones are about as large. Samples, drawn with ``loops``, are (n, C, H, W) pictures or (n, C, F, H, W)
    clips, uint8, on the device that is to search; ``batch_size`` training samples are decoded at once.
    """
    real = decoded(data, val=False, batch_size=batch_size, device=samples.device)
    real = counted(real, "training sample", None)
    val = next(decoded(data, val=True, batch_size=len(samples), device=samples.device))
    both = nearest_items(torch.cat([samples, val]), real)  # one search: the training samples are decoded once
    found, of_val = (
        Nearest(*(part[: len(samples)] for part in both)),
        Nearest(*(part[len(samples) :] for part in both)),
    )
    write_figure(folder / "nearest.png", nearest_figure(samples, found))
    content = {
        "loops": loops,
        "distances": found.distances.tolist(),
        "training_samples": found.indices.tolist(),
        "distances_of_val_samples": of_val.distances.tolist(),
    }
    write_json(folder / "nearest.json", content, indent=2)
    print(folder / "nearest.png")


def decoded(data: GenerativeDataModule, val: bool, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Decode all training or held-out samples: (B, C, …) uint8, as they are shown."""
    tokenizer = data.tokenizer.to(device)
    for codes in data.all_codes(val, batch_size):
        yield tokenizer.present(tokenizer.decode(codes.to(device)))

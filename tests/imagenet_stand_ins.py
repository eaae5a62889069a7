"""Writes what `make imagenet SMOKE=1` works on: drawn pictures in ImageNet's layout, random networks in published ones.

The random files stand in for those that cannot be had without internet. Numbers that come of them mean nothing.
"""

import sys
from pathlib import Path

import torch
from image_folders import write_broken, write_class_folders, write_flat, write_label_files
from published_layouts import write_maskgit_vqgan, write_sd_vae

from elt_lightning.metrics.inception import FIDInception


def write_stand_ins(folder: Path) -> None:
    """Write ``imagenet/train``, ``imagenet/val``, ``val_labels.csv``, ``vqgan.bin``, ``vae`` and ``inception.pth``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_class_folders(folder / "imagenet" / "train", per_class=8)
    write_broken(folder / "imagenet" / "train" / "n01440764")
    classes = write_flat(folder / "imagenet" / "val")
    write_label_files(folder, folder / "imagenet" / "val", classes)["kaggle"].rename(folder / "val_labels.csv")
    write_maskgit_vqgan(folder / "vqgan.bin")
    write_sd_vae(folder / "vae")
    write_inception(folder / "inception.pth")


def write_inception(path: Path) -> Path:
    """Write a randomly initialised state dict in the layout of the FID weights (96 MB)."""
    network, generator = FIDInception(), torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # keep what goes through about as large as what came in
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(std=std, generator=generator)
    torch.save(network.state_dict(), path)
    return path


if __name__ == "__main__":
    write_stand_ins(Path(sys.argv[1]))

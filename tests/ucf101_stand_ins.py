"""Writes what `make ucf101 SMOKE=1` works on: moving digits in UCF-101's layout, small networks with I3D's signature.

The networks stand in for those that cannot be had without internet. Numbers that come of them mean nothing.
"""

import sys
from pathlib import Path

from video_networks import SmallC3D, SmallI3D, write_network

from elt_lightning.data.toy.moving_digits import MovingDigits


def write_stand_ins(folder: Path) -> None:
    """Write ``videos/UCF-101``, ``videos/ucfTrainTestlist``, ``i3d.pt`` and ``c3d.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    MovingDigits(training_videos=3, val_videos=1, side=32).write(folder / "videos")
    write_network(folder / "i3d.pt", SmallI3D())
    write_network(folder / "c3d.pt", SmallC3D())


if __name__ == "__main__":
    write_stand_ins(Path(sys.argv[1]))

"""Reading clips takes no more memory in the hundredth epoch than in the first.

Measured in a process of its own, which this file is the program of: what other tests left free would hide a leak.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from video_files import write_ucf101

from elt_lightning.data.clip_batches import TrainingClips
from elt_lightning.data.clips import ClipShape
from elt_lightning.data.ucf101 import list_videos

EPOCHS, VIDEOS = 100, 12
BYTES_PER_CLIP = 2_000
"""What memory may grow by; a frame that were kept is 12,288 bytes."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux counts")


def read_epochs(root: Path, lists: Path, leak: bool) -> float:
    """Read a clip of each video in each epoch; give the bytes per clip that memory grows by after 40 epochs."""
    clips = TrainingClips(list_videos(root, lists, "all", val=False), ClipShape(num_frames=16, size=64))
    memory, kept = [], []
    for epoch in range(EPOCHS):
        for place in range(VIDEOS):
            clip = clips.read(place, epoch, [])
            assert clip is not None
            kept += [clip.pixels[:, 0].clone()] if leak else []
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    settled = memory[40 * VIDEOS :]
    return float(np.polyfit(range(len(settled)), settled, 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("leak", [False, True], ids=["as it is", "a frame kept of each"])
def test_memory_stays_flat_over_epochs(leak: bool, tmp_path: Path) -> None:
    root, lists = write_ucf101(tmp_path, [24] * VIDEOS)
    command = [sys.executable, __file__, root, lists, *(["leak"] if leak else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{float(done.stdout):.0f} bytes per clip")
    assert (float(done.stdout) > BYTES_PER_CLIP) == leak


if __name__ == "__main__":
    print(read_epochs(Path(sys.argv[1]), Path(sys.argv[2]), leak="leak" in sys.argv))

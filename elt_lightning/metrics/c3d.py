"""The C3D network of the Inception score of UCF-101: probabilities of its 101 classes.

Sources: github.com/universome/stylegan-v, src/metrics/video_inception_score.py, whose file is the network of
github.com/pfnet-research/tgan2, tgan2/models/c3d/c3d_ucf101.py, trained on Sports-1M and on UCF-101's first split.
StyleGAN-V gives that file 16 frames as RGB bytes (B, 3, 16, H, W) and nothing else. What C3D itself takes is made
inside, as in TGAN2: BGR in 0 … 255, resized to 112×112 with aligned corners, less the mean clip; nothing is cropped.
"""

import torch
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.metrics.torchscript import AT_ONCE, TorchScriptNetwork, clip_bytes

FRAMES = 16
"""Frames of a clip, as many as the mean clip has that the network subtracts."""


class C3D(TorchScriptNetwork):
    """C3D from ``c3d_ucf101.pt``: ``forward(x)`` gives class probabilities."""

    title = "C3D"
    setting = "c3d_path"
    url = "https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt"
    num_outputs = 101

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Read clips (B, 3 or 1, 16, H, W), float in [0, 1] rounded to bytes, or bytes: (B, 101) float32.

        Raises:
            UserError: there are not 16 frames, or the file is that of another network.
        """
        if pixels.ndim == 5 and pixels.shape[2] != FRAMES:
            raise UserError(
                f"C3D, and with it the Inception score, needs clips of {FRAMES} frames, not {pixels.shape[2]}: leave "
                "c3d_path out"
            )
        outputs = torch.cat([self.read(part) for part in clip_bytes(pixels).split(AT_ONCE)])
        if (outputs < 0).any() or ((outputs.sum(1) - 1).abs() > 1e-3).any():
            raise UserError(f"C3D gave numbers that are no probabilities, so its file is another one: {self.where()}")
        return outputs

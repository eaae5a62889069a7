"""The I3D network of FVD: 400 class scores of a clip, trained on Kinetics-400.

Source: github.com/universome/stylegan-v, src/metrics/frechet_video_distance.py; github.com/universome/fvd-comparison
shows that its TorchScript file gives what the original, tfhub.dev/deepmind/i3d-kinetics-400/1, gives. The same file is
kept at huggingface.co/flateon/FVD-I3D-torchscript.

Cross-check: of 8 clips of 30 frames, 64×64, all black against all white, the distance is 151.26 with the published
file, and 151.39 with the original.
"""

import torch
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.metrics.inception import resize_tf1
from elt_lightning.metrics.torchscript import AT_ONCE, TorchScriptNetwork, clip_bytes

SIDE = 224
"""Height and width that the network reads."""

MINIMUM_FRAMES = 9
"""I3D reduces F frames to ⌈F/8⌉ and then averages pairs of neighbours, so it needs two
(google-research/magvit, videogvt/train_lib/frechet_distance.py)."""


class I3D(TorchScriptNetwork):
    """I3D from ``i3d_torchscript.pt``: ``forward(x, rescale=False, resize=False, return_features=False)``."""

    title = "I3D"
    setting = "i3d_path"
    url = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"
    published_sha256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
    arguments = ("rescale", "resize", "return_features")
    num_outputs = 400

    def features(self, pixels: Tensor, tensorflow_resize: bool = False) -> Tensor:
        """Read clips (B, 3 or 1, F, H, W), float in [0, 1] rounded to bytes, or bytes: (B, 400) float32.

        Args:
            pixels: the clips, of at least 9 frames.
            tensorflow_resize: resize to 224×224 as TensorFlow 1 did, as MAGVIT's numbers are; otherwise the file itself
                resizes, as in StyleGAN-V.

        Raises:
            UserError: there are too few frames, or the file is that of another network.
        """
        if pixels.ndim == 5 and pixels.shape[2] < MINIMUM_FRAMES:
            raise UserError(
                f"I3D, and with it FVD, needs clips of at least {MINIMUM_FRAMES} frames, not {pixels.shape[2]}: score "
                "longer clips, or leave i3d_path out"
            )
        read = self._read_tensorflow_resized if tensorflow_resize else self._read_bytes
        return torch.cat([read(part) for part in clip_bytes(pixels).split(AT_ONCE)])

    def _read_bytes(self, clips: Tensor) -> Tensor:
        return self.read(clips, rescale=True, resize=True, return_features=True)

    def _read_tensorflow_resized(self, clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2)  # B F 3 H W
        resized = resize_tf1(frames.flatten(0, 1).float(), SIDE).unflatten(0, frames.shape[:2]).transpose(1, 2)
        return self.read((resized / 127.5 - 1).contiguous(), rescale=False, resize=False, return_features=True)

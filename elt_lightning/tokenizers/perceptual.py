"""A distance between pictures that is closer to what people see than that of their pixels.

Features of VGG16 after the last ReLU of each of its five stages, each place scaled to unit length over channels, their
squared differences summed over channels, averaged over places and summed over stages: LPIPS (Zhang et al. 2018,
arXiv:1801.03924) before its learned weights of channels. MAGVIT compares a ResNet-50's logits, whose weights were not
published with it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.training.weights import differences

PUBLISHED = "https://download.pytorch.org/models/vgg16-397923af.pth"

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions; each stage has half the height and width of the one before it."""

CLASSIFIER = ((0, 4096, 25088), (3, 4096, 4096), (6, 1000, 4096))
"""Place, outputs and inputs of the linear layers, which are in the file and not used."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet in [0, 1], by which torchvision's networks take them scaled."""


class PerceptualLoss:
    """Compare pictures by a frozen VGG16.

    It is no module: as an attribute of one it stays out of checkpoints. It follows its input to its device.

    Args:
        path: torchvision's ``vgg16-397923af.pth``.

    Raises:
        UserError: there is no such file, or it does not hold exactly VGG16.
    """

    def __init__(self, path: str) -> None:
        state = read_vgg16(path)
        with torch.device("meta"):
            self.features = vgg16_features()
        names = [name for name in state if name.startswith("features.")]
        weights = {name.removeprefix("features."): state[name].float() for name in names}
        self.features.load_state_dict(weights, assign=True)
        self.features.requires_grad_(False).eval()

    def __call__(self, pixels: Tensor, others: Tensor) -> Tensor:
        """Return the mean distance of (B, 3, H, W) or, frame by frame, (B, 3, F, H, W), float in [0, 1]."""
        self.features.to(pixels.device)
        compared = [self.stages(frames(pictures)) for pictures in (pixels, others)]
        return sum(
            ((mine - theirs).square().sum(1).mean() for mine, theirs in zip(*compared, strict=True)),
            start=pixels.new_zeros(()),
        )

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Return the unit-length features of pictures (B, 3, H, W) after each of the five stages, float32."""
        mean, deviation = (pictures.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        hidden, stages = (pictures - mean) / deviation, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(hidden)
            hidden = layer(hidden)
        return [F.normalize(hidden.float(), dim=1, eps=1e-10) for hidden in (*stages, hidden)]


def frames(pixels: Tensor) -> Tensor:
    """Lay the frames of clips (B, 3, F, H, W) out as pictures (B·F, 3, H, W); pictures stay as they are."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)


def vgg16_features() -> nn.Sequential:
    """Build VGG16's convolutions with torchvision's numbering of layers, up to the last ReLU."""
    layers: list[nn.Module] = []
    before = 3
    for stage in STAGES:
        for channels in stage:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def read_vgg16(path: str) -> dict[str, Tensor]:
    """Read torchvision's state dict of VGG16; no code of the file is run.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not is_file(path):
        raise UserError(f"there is no file {path} of VGG16's weights: {PUBLISHED} has them")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the unpickler raise
        raise UserError(
            f"cannot read the VGG16 weights {path} ({type(error).__name__}): fetch {PUBLISHED} anew"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds something else than tensors by name: VGG16's are at {PUBLISHED}")
    with torch.device("meta"):
        expected = {f"features.{name}": value for name, value in vgg16_features().state_dict().items()}
        for place, outputs, inputs in CLASSIFIER:
            expected[f"classifier.{place}.weight"] = torch.empty(outputs, inputs)
            expected[f"classifier.{place}.bias"] = torch.empty(outputs)
    if faults := differences(expected, state):
        raise UserError(f"{path} is not torchvision's VGG16 (tensors: {faults}): {PUBLISHED} is")
    return state

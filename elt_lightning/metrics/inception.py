"""The Inception-v3 of FID: the TensorFlow network of 5 December 2015, in the PyTorch layout of its published weights.

Layout: github.com/mseitzer/pytorch-fid, src/pytorch_fid/inception.py. Which tensors are read, and how pictures are
prepared: github.com/openai/guided-diffusion, evaluations/evaluator.py, whose ``mixed_6`` is ``Mixed_6d`` here.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.errors import UserError
from elt_lightning.files import is_file, sha256, written_aside
from elt_lightning.tokenizers.base import to_bytes
from elt_lightning.training.weights import differences, read_tensors

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
DOWNLOADS = "data/cache"
WEIGHTS_SHA256 = "6726825d"
"""The first digits of the published file's SHA-256."""

SIDE = 299
"""Height and width that the network reads."""

AT_ONCE = 64
"""Pictures in one forward pass, which bounds memory; it does not change results."""


class InceptionFeatures(NamedTuple):
    """What the metrics read of B pictures, float32."""

    pool: Tensor  # (B, 2048), the last block averaged over places: FID
    spatial: Tensor  # (B, 2023), 17·17 places of the first 7 channels of ``Mixed_6d``, channels last: sFID
    logits_unbiased: Tensor  # (B, 1008), class scores without the bias: Inception score


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU; ``padded`` keeps height and width."""

    def __init__(
        self, channels: int, out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(self.bn(self.conv(x)), inplace=True)


# TensorFlow averages over the places inside the picture alone.
_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class MixedA(nn.Module):
    """Mixed_5b to Mixed_5d, 35×35."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64)
        self.branch5x5_1 = Convolution(channels, 48)
        self.branch5x5_2 = Convolution(48, 64, (5, 5))
        self.branch3x3dbl_1 = Convolution(channels, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, (3, 3))
        self.branch3x3dbl_3 = Convolution(96, 96, (3, 3))
        self.branch_pool = Convolution(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class MixedB(nn.Module):
    """Mixed_6a, 35×35 to 17×17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, (3, 3), stride=2, padded=False)
        self.branch3x3dbl_1 = Convolution(channels, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, (3, 3))
        self.branch3x3dbl_3 = Convolution(96, 96, (3, 3), stride=2, padded=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halve(x)], 1)


class MixedC(nn.Module):
    """Mixed_6b to Mixed_6e, 17×17."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 192)
        self.branch7x7_1 = Convolution(channels, inner)
        self.branch7x7_2 = Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(channels, inner)
        self.branch7x7dbl_2 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(inner, 192, (1, 7))
        self.branch_pool = Convolution(channels, 192)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class MixedD(nn.Module):
    """Mixed_7a, 17×17 to 8×8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192)
        self.branch3x3_2 = Convolution(192, 320, (3, 3), stride=2, padded=False)
        self.branch7x7x3_1 = Convolution(channels, 192)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, (3, 3), stride=2, padded=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), _halve(x)], 1)


class MixedE(nn.Module):
    """Mixed_7b and Mixed_7c, 8×8. In this network the second one pools by the maximum."""

    def __init__(self, channels: int, pool_by_maximum: bool) -> None:
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = Convolution(channels, 320)
        self.branch3x3_1 = Convolution(channels, 384)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(channels, 448)
        self.branch3x3dbl_2 = Convolution(448, 384, (3, 3))
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(channels, 192)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _maximum(x) if self.pool_by_maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class FIDInception(nn.Module):
    """The network that FID, sFID and the Inception score are defined by. It is frozen and always in eval mode.

    Attributes:
        sha256: of the file that the weights came from; empty before :meth:`load`.
    """

    name = "inception-2015-12-05"
    num_pool = 2048
    num_spatial = 7 * 17 * 17
    num_classes = 1008

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = ""
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padded=False)
        self.Mixed_5b = MixedA(192, pooled=32)
        self.Mixed_5c = MixedA(256, pooled=64)
        self.Mixed_5d = MixedA(288, pooled=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, inner=128)
        self.Mixed_6c = MixedC(768, inner=160)
        self.Mixed_6d = MixedC(768, inner=160)
        self.Mixed_6e = MixedC(768, inner=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, pool_by_maximum=False)
        self.Mixed_7c = MixedE(2048, pool_by_maximum=True)
        self.fc = nn.Linear(self.num_pool, self.num_classes)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, path: str | Path) -> "FIDInception":
        """Build the network from its published weights: a file, or "download" to fetch it into :data:`DOWNLOADS`.

        Raises:
            UserError: the file is missing, cannot be read, or holds other tensors.
        """
        if path == "download":
            path = download_inception(DOWNLOADS)
        network = cls()
        where = f"download {WEIGHTS_URL} and give its path as inception_path"
        state = read_tensors(path, "Inception weights", where)
        expected = _without_counters(network.state_dict())
        given = _without_counters(state)
        if faults := differences(expected, given):
            raise UserError(
                f"{path} does not hold the Inception weights of FID (tensors: {faults}); they are published at "
                f"{WEIGHTS_URL}"
            )
        network.load_state_dict(given, strict=False)
        network.sha256 = sha256(path)
        return network

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    def features(self, pixels: Tensor) -> InceptionFeatures:
        """Read pictures: (B, 3, H, W), or (B, 1, H, W) grey, as bytes or as float in [0, 1], which become bytes first.

        Autocast and the fast matrix arithmetic of GPUs are off meanwhile, for scores that do not depend on them.
        """
        bytes_ = pixels if pixels.dtype == torch.uint8 else to_bytes(pixels)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False), full_float32():
            parts = [self(part) for part in bytes_.expand(-1, 3, -1, -1).split(AT_ONCE)]
        return InceptionFeatures(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Read a few pictures (B, 3, H, W) uint8 in one pass."""
        x = (resize_tf1(images.float(), SIDE) - 128) / 128
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((2, 3))
        return InceptionFeatures(pool, spatial, F.linear(pool, self.fc.weight))


def download_inception(folder: str | Path) -> Path:
    """Fetch the published weights into a folder, once; return the file's path.

    Raises:
        UserError: there is no internet, or what came is not the published file.
    """
    path = Path(folder) / WEIGHTS_URL.rsplit("/", 1)[-1]
    if is_file(path):
        return path
    try:
        with written_aside(path) as aside:
            torch.hub.download_url_to_file(WEIGHTS_URL, str(aside), WEIGHTS_SHA256, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(f"cannot download {WEIGHTS_URL} to {path} ({error}): fetch it by hand") from error
    print(f"made {path}: Inception's weights, downloaded", flush=True)
    return path


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Resize as TensorFlow 1 did: bilinear, no antialiasing, place i reads from i · (old size / new size).

    (B, C, H, W) float32 to (B, C, side, side). Source: tensorflow/core/kernels/image/resize_bilinear_op.cc with
    neither ``align_corners`` nor ``half_pixel_centers``.
    """
    for dim in (3, 2):  # columns first, which fixes the rounding
        size = images.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        below = place.long()
        above = (below + 1).clamp(max=size - 1)
        weight = (place - below).view(-1, *[1] * (3 - dim))
        low = images.index_select(dim, below)
        images = low + (images.index_select(dim, above) - low) * weight
    return images


@contextmanager
def full_float32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 inside float32 convolutions and matrix products."""
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    operations: list[Any] = [cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul]  # type: ignore[attr-defined]
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def _without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the counters of training steps, which some copies of the weights have and others have not."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}

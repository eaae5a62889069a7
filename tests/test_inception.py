"""The Inception network against a second one, written on plain matrix products from a table of its layers."""

from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.metrics import inception
from elt_lightning.metrics.inception import FIDInception, download_inception, full_float32, resize_tf1
from elt_lightning.tokenizers.base import to_bytes

# A chain of convolutions is written "name:channels:kernel", with /2 for a stride of 2 and ! for no padding.
STEM = ["Conv2d_1a_3x3:32:3x3/2! Conv2d_2a_3x3:32:3x3! Conv2d_2b_3x3:64:3x3", "max/2!"]
STEM += ["Conv2d_3b_1x1:80:1x1 Conv2d_4a_3x3:192:3x3!", "max/2!"]
A = [
    "branch1x1:64:1x1",
    "branch5x5_1:48:1x1 branch5x5_2:64:5x5",
    "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3",
    "mean branch_pool:{0}:1x1",
]
B = [
    "branch3x3:384:3x3/2!",
    "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3/2!",
    "max/2!",
]
C = [
    "branch1x1:192:1x1",
    "branch7x7_1:{0}:1x1 branch7x7_2:{0}:1x7 branch7x7_3:192:7x1",
    "branch7x7dbl_1:{0}:1x1 branch7x7dbl_2:{0}:7x1 branch7x7dbl_3:{0}:1x7 branch7x7dbl_4:{0}:7x1 "
    "branch7x7dbl_5:192:1x7",
    "mean branch_pool:192:1x1",
]
D = [
    "branch3x3_1:192:1x1 branch3x3_2:320:3x3/2!",
    "branch7x7x3_1:192:1x1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3x3/2!",
    "max/2!",
]
E = [
    "branch1x1:320:1x1",
    "branch3x3_1:384:1x1 branch3x3_2a:384:1x3",
    "branch3x3_1:384:1x1 branch3x3_2b:384:3x1",
    "branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3 branch3x3dbl_3a:384:1x3",
    "branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3 branch3x3dbl_3b:384:3x1",
    "{0} branch_pool:192:1x1",
]
BLOCKS: list[tuple[str, list[str], object]] = [
    ("Mixed_5b", A, 32),
    ("Mixed_5c", A, 64),
    ("Mixed_5d", A, 64),
    ("Mixed_6a", B, None),
    ("Mixed_6b", C, 128),
    ("Mixed_6c", C, 160),
    ("Mixed_6d", C, 160),
    ("Mixed_6e", C, 192),
    ("Mixed_7a", D, None),
    ("Mixed_7b", E, "mean"),
    ("Mixed_7c", E, "max"),
]


def published_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, from the table."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

    def follow(prefix: str, chain: str, channels: int) -> int:
        for step in chain.split():
            if ":" not in step:
                continue
            name, out, kernel = step.rstrip("!").removesuffix("/2").split(":")
            height, width = map(int, kernel.split("x"))
            shapes[f"{prefix}{name}.conv.weight"] = (int(out), channels, height, width)
            shapes.update({f"{prefix}{name}.bn.{part}": (int(out),) for part in BATCH_NORM})
            channels = int(out)
        return channels

    channels = 3
    for chain in STEM:
        channels = follow("", chain, channels)
    for block, chains, setting in BLOCKS:
        channels = sum(follow(f"{block}.", chain.format(setting), channels) for chain in chains)
    return shapes


BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def random_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_layout().items():
        if name.endswith(("bn.weight", "running_var")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif len(shape) == 1:
            state[name] = torch.randn(shape, generator=generator) * 0.1
        else:
            fan_in = torch.Size(shape[1:]).numel()
            state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return state


def windows(x: Tensor, kernel: tuple[int, int], stride: int, padded: bool, fill: float) -> Tensor:
    """(B, C, H, W) to (B, H', W', C, kernel height · width)."""
    height, width = kernel
    if padded:
        x = F.pad(x, (width // 2, width // 2, height // 2, height // 2), value=fill)
    return x.unfold(2, height, stride).unfold(3, width, stride).flatten(4).permute(0, 2, 3, 1, 4)


def second_network(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prepared pictures (B, 3, 299, 299) float64 to pooled features, spatial features and logits without bias."""

    def follow(prefix: str, chain: str, x: Tensor) -> Tensor:
        for step in chain.split():
            stride, padded = 1 + ("/2" in step), not step.endswith("!")
            if step.startswith("max"):
                x = windows(x, (3, 3), stride, padded, -torch.inf).amax(-1).permute(0, 3, 1, 2)
            elif step == "mean":
                sums = windows(x, (3, 3), 1, True, 0).sum(-1)
                x = (sums / windows(torch.ones_like(x[:1, :1]), (3, 3), 1, True, 0).sum(-1)).permute(0, 3, 1, 2)
            else:
                name = prefix + step.split(":")[0]
                kernel = state[f"{name}.conv.weight"].double()
                parts = windows(x, (kernel.shape[2], kernel.shape[3]), stride, padded, 0).flatten(3)
                scale, shift, mean, variance = (state[f"{name}.bn.{part}"].double() for part in BATCH_NORM)
                x = (parts @ kernel.flatten(1).T - mean) / (variance + 0.001).sqrt() * scale + shift
                x = x.clamp(min=0).permute(0, 3, 1, 2)
        return x

    for chain in STEM:
        x = follow("", chain, x)
    for block, chains, setting in BLOCKS:
        x = torch.cat([follow(f"{block}.", chain.format(setting), x) for chain in chains], dim=1)
        if block == "Mixed_6d":  # mixed_6 of the TensorFlow graph; its array has channels last
            spatial = torch.stack([x[:, channel] for channel in range(7)], dim=-1).flatten(1)
    pool = x.flatten(2).mean(2)
    return pool, spatial, pool @ state["fc.weight"].double().T


def naive_resize(picture: list[list[float]], side: int) -> list[list[float]]:
    """One channel, place by place, in Python's double precision."""
    height, width = len(picture), len(picture[0])
    out = []
    for i in range(side):
        y = i * height / side
        row = []
        for j in range(side):
            x = j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = picture[top][left] * (1 - (x - left)) + picture[top][right] * (x - left)
            lower = picture[bottom][left] * (1 - (x - left)) + picture[bottom][right] * (x - left)
            row.append(upper * (1 - (y - top)) + lower * (y - top))
        out.append(row)
    return out


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> FIDInception:
    return FIDInception.load(weights)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """A colour picture and a smooth one, as float."""
    generator = torch.Generator().manual_seed(5)
    smooth = F.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (60, 70), mode="bilinear")
    return torch.cat([torch.rand(1, 3, 60, 70, generator=generator), smooth])


def test_features_equal_those_of_a_second_network(
    network: FIDInception, state: dict[str, Tensor], pixels: Tensor
) -> None:
    prepared = [[naive_resize(channel, 299) for channel in picture] for picture in to_bytes(pixels).tolist()]
    expected = second_network(state, (torch.tensor(prepared, dtype=torch.float64) - 128) / 128)
    features = network.features(pixels)
    assert [tuple(values.shape) for values in features] == [(2, 2048), (2, 2023), (2, 1008)]
    for ours, theirs in zip(features, expected, strict=True):
        assert ours.dtype == torch.float32
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_layout_is_the_published_one(network: FIDInception) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {name: shape for name, shape in ours.items() if not name.endswith("num_batches_tracked")} == (
        published_layout()
    )
    # torchvision documents 27,161,264, of which its second classifier has 3,326,696; here there are 8 more classes.
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 27_161_264 - 3_326_696 + 8 * (2048 + 1)


def test_bytes_floats_and_grey_pictures_are_read_alike(network: FIDInception, pixels: Tensor) -> None:
    grey = pixels[:1, :1, :40, :40]
    as_colour = network.features(to_bytes(grey).repeat(1, 3, 1, 1))
    for pictures in (grey, to_bytes(grey), (to_bytes(grey) + 0.4) / 255, (to_bytes(grey) - 0.4) / 255):
        for ours, theirs in zip(network.features(pictures), as_colour, strict=True):
            assert torch.equal(ours, theirs)


def test_precision_mode_and_gradients_are_not_the_callers(network: FIDInception, pixels: Tensor) -> None:
    picture = pixels[:1].clone().requires_grad_()
    expected = network.features(pixels[:1])
    network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network.features(picture)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for ours, theirs in zip(features, expected, strict=True):
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)


def test_many_pictures_are_read_a_few_at_a_time(
    network: FIDInception, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = network.features(pixels)
    monkeypatch.setattr(inception, "AT_ONCE", 1)
    for one_by_one, expected in zip(network.features(pixels), together, strict=True):
        assert torch.allclose(one_by_one, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fast_arithmetic() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("fast_arithmetic")
def test_full_float32_is_asked_for_and_then_given_back() -> None:
    def precisions() -> list[str]:
        backends = torch.backends
        return [backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision]  # type: ignore[attr-defined]

    before = precisions()
    assert before[1] == "tf32"
    with full_float32():
        assert precisions() == ["ieee", "ieee"]
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(("height", "width", "side"), [(5, 8, 13), (13, 9, 5), (7, 7, 7), (1, 2, 6), (32, 48, 29)])
def test_resize_equals_a_loop_over_places(height: int, width: int, side: int) -> None:
    images = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(side)).float()
    expected = [[naive_resize(channel, side) for channel in picture] for picture in images.tolist()]
    assert (resize_tf1(images, side) - torch.tensor(expected)).abs().max() < 2e-3


def test_resize_to_the_same_size_changes_nothing_and_doubling_repeats_the_last_place() -> None:
    images = torch.rand(1, 2, 6, 6)
    assert torch.equal(resize_tf1(images, 6), images)
    doubled = resize_tf1(torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]]), 4)
    assert doubled[0, 0].tolist() == [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]


def test_files_with_counters_or_in_the_old_format_load(
    state: dict[str, Tensor], network: FIDInception, weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "old.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    again = FIDInception.load(path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())
    assert (network.sha256, again.sha256) == (sha256(weights), sha256(path))


def test_wrong_files_are_refused_in_one_clear_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    def complaint(content: object) -> str:
        path = tmp_path / "wrong.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match=r"wrong\.pth") as caught:
            FIDInception.load(path)
        assert "\n" not in str(caught.value)
        assert inception.WEIGHTS_URL in str(caught.value)
        return str(caught.value)

    few = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    assert "2 missing such as fc.bias" in complaint(few)
    assert "1 extra such as AuxLogits.fc.bias" in complaint(state | {"AuxLogits.fc.bias": torch.zeros(1)})
    assert "of another shape such as fc.weight (1000, 2048), not (1008, 2048)" in complaint(
        state | {"fc.weight": torch.ones(1000, 2048)}
    )
    assert "cannot read" in complaint(b"no weights")
    assert "cannot read" in complaint(b"")
    assert "cannot read" in complaint(Path("."))  # a file that would run code
    assert "plain tensors" in complaint([torch.ones(2)])
    assert "plain tensors" in complaint({"state": {}})


def test_a_missing_file_says_where_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth do not exist: download https://.*inception_path"):
        FIDInception.load(tmp_path / "nowhere.pth")


def test_download_is_checked_kept_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "published.pth"
    source.write_bytes(b"weights")
    monkeypatch.setattr(inception, "WEIGHTS_URL", source.as_uri())
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", "0000")
    with pytest.raises(UserError, match=r"cannot download .*invalid hash"):
        download_inception(tmp_path / "here")
    assert not any((tmp_path / "here").iterdir())
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256(source)[:8])
    path = download_inception(tmp_path / "here")
    assert path == tmp_path / "here" / "published.pth"
    assert path.read_bytes() == b"weights"
    source.unlink()
    assert download_inception(tmp_path / "here") == path


def test_download_without_internet_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"cannot download https://github.*no route to host.*by hand"):
        download_inception(tmp_path)
    assert not list(tmp_path.iterdir())

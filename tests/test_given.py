"""Drawing the rest of a clip or a picture: what is given stays, and what is hidden is not looked at."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from predictions import stateless
from torch import Tensor

from elt_lightning.cli import main
from elt_lightning.data.decoding import read_clip, write_clip
from elt_lightning.errors import UserError
from elt_lightning.evaluation.given import Hole, hide, read_given
from elt_lightning.evaluation.known import GREY, known_pixels
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.video_vq import VideoVQ, write_tokenizer
from elt_lightning.tokenizers.vq_network import VQNetwork, VQSettings
from elt_lightning.training.module import ELTModule

V, GRID, SHAPE = 16, (4, 4, 4), (8, 16, 16)


@pytest.fixture
def tokenizer(tmp_path: Path) -> VideoVQ:
    torch.manual_seed(0)
    settings = VQSettings(3, 4, (1, 1, 1), 1, 1, V, 4, "zeros")
    write_tokenizer(tmp_path / "tokenizer.safetensors", VQNetwork(settings), SHAPE)
    return VideoVQ(str(tmp_path / "tokenizer.safetensors"))


@pytest.fixture
def module() -> ELTModule:
    """A model of clips of 4×4×4 tokens."""
    network = LoopedMaskedTransformer(
        codebook_size=V, input_shape=GRID, num_classes=2, num_layers=1, width=8, num_heads=2
    )
    sampler = partial(MaskGITSampler, steps=4)
    return ELTModule(network, MaskingProcess(V), MaskedObjective, ILSD(2), sampler, num_classes=2).eval()


def clip_file(path: Path, frames: Tensor) -> Path:
    write_clip(path, frames, fps=8)
    return path


def noise(seed: int, count: int = 12) -> Tensor:
    return torch.randint(256, (count, 16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frames", "hole", "num_known"), [(1, None, 16), (3, None, 48), (None, (1, 0, 3, 4), 32), (2, (0, 0, 2, 2), 24)]
)
def test_known_tokens_are_those_that_are_given(
    frames: int | None, hole: Hole | None, num_known: int, module: ELTModule, tokenizer: VideoVQ, tmp_path: Path
) -> None:
    path = clip_file(tmp_path / "clip.avi", noise(1))
    known = read_given(path, module, tokenizer, frames, hole).known
    kept = torch.ones(GRID, dtype=torch.bool)
    kept[frames or 4 :] = False
    if hole is not None:
        kept[:, hole[0] : hole[2], hole[1] : hole[3]] = False
    assert torch.equal(known[0] < V, kept.flatten())
    assert int(kept.sum()) == num_known
    given = module.sampler.sample(
        stateless(lambda x, condition, loops: torch.randn(*x.shape, V)), (64,), None, 1, torch.tensor([3]), known
    )
    assert torch.equal(given[0][kept.flatten()], known[0][kept.flatten()])
    assert (given < V).all()


@pytest.mark.parametrize(("frames", "hole"), [(2, None), (None, (1, 0, 3, 4)), (2, (0, 0, 2, 2))])
def test_what_is_hidden_does_not_matter(
    frames: int | None, hole: Hole | None, module: ELTModule, tokenizer: VideoVQ, tmp_path: Path
) -> None:
    """Two clips that differ only in hidden pixels are given alike; the files are lossy, so that clips are compared."""
    path = clip_file(tmp_path / "clip.avi", noise(1))
    clip = read_clip(path, 0, 8).permute(3, 0, 1, 2) / 255
    unknown = torch.zeros(GRID, dtype=torch.bool)
    unknown[frames or 4 :] = True
    if hole is not None:
        unknown[:, hole[0] : hole[2], hole[1] : hole[3]] = True
    hidden = unknown.repeat_interleave(2, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    other = torch.where(hidden, torch.rand(3, *SHAPE), clip)
    seen = hide(clip, unknown, frames)
    assert torch.equal(seen, hide(other, unknown, frames))
    assert torch.equal(seen[:, ~hidden], clip[:, ~hidden])
    assert torch.equal(read_given(path, module, tokenizer, frames, hole).pixels[0], seen)
    if hole is None:
        assert torch.equal(seen[:, 4:], seen[:, 3:4].expand(-1, 4, -1, -1))


def test_the_stride_chooses_frames(module: ELTModule, tokenizer: VideoVQ, tmp_path: Path) -> None:
    path = clip_file(tmp_path / "clip.avi", noise(1, count=16))
    pixels = read_given(path, module, tokenizer, 3, None, stride=2).pixels
    assert torch.equal(pixels[0, :, :6], read_clip(path, 0, 6, stride=2).permute(3, 0, 1, 2) / 255)


@pytest.mark.parametrize(
    ("settings", "telling"),
    [
        ({"frames": 4}, "4 frames cannot be given of a grid of 4×4×4"),
        ({"hole": (0, 0, 5, 2)}, "no rectangle in a grid of 4 rows and 4 columns"),
        ({"hole": (2, 0, 2, 2)}, "no rectangle"),
        ({"frames": 1, "stride": 2}, "cannot be read as a clip.*ends before frame"),
    ],
)
def test_parts_that_cannot_be_given(
    settings: dict[str, Any], telling: str, module: ELTModule, tokenizer: VideoVQ, tmp_path: Path
) -> None:
    path = clip_file(tmp_path / "clip.avi", noise(1))
    with pytest.raises(UserError, match=telling):
        read_given(path, module, tokenizer, **{"frames": None, "hole": None} | settings)


def test_the_command_fills_a_hole(
    small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    command = ["sample", "--ckpt_path", str(small_squares), "--num=3", "--output", str(tmp_path / "filled.png")]
    Image.new("L", (40, 40), 200).save(tmp_path / "square.png")
    given = ["--given", str(tmp_path / "square.png")]
    assert main([*command, *given, "--hole=1,1,4,4", "--loops=1,2"]) == 0
    with Image.open(tmp_path / "filled.png") as picture:
        assert picture.height > picture.width * 0.7  # the given one and two rows below it
    for wrong, telling in (
        ([*given], "--given goes with"),
        (["--hole=1,1,4,4"], "--given goes with"),
        (["--given_stride=2"], "--given_stride goes with --given"),
        ([*given, "--hole=1,1,4,4", "--given_stride=2"], "draws pictures, which have no frames"),
        (["--classes=0,1,2,3"], "--classes names 4, and --num 3 draws no more"),
        (["--weak_loops=1"], "weak_loops alone changes nothing"),
        ([*given, "--hole=1,1"], "top, left, bottom and right"),
        ([*given, "--given_frames=1"], "cannot be given"),
        (["--given=none.png", "--hole=1,1,4,4"], "none.png cannot be read"),
    ):
        capsys.readouterr()
        assert main([*command, "--overwrite", *wrong]) == 2
        assert telling in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_given_of_latents_is_shown_between_grey(channels: int) -> None:
    latents = torch.rand(2, channels, 4, 6) * 2 - 1
    unknown = torch.zeros(2, 4, 6, dtype=torch.bool)
    unknown[0, 1:3, 2:], unknown[1, 0] = True, True
    pixels = known_pixels(latents.masked_fill(unknown[:, None], torch.nan), (4, 6), None, PixelScaling())
    everywhere = unknown[:, None].expand_as(pixels)
    assert (pixels[everywhere] == GREY).all()
    torch.testing.assert_close(pixels[~everywhere], ((latents + 1) / 2)[~everywhere])

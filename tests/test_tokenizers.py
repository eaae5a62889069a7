import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elt_lightning.errors import UserError
from elt_lightning.tokenizers.base import to_bytes
from elt_lightning.tokenizers.patch_vq import PatchVQTokenizer, cut_patches, join_patches
from elt_lightning.tokenizers.pixels import PixelTokenizer


def random_codebook(codes: int, side: int, seed: int) -> Tensor:
    return torch.rand(codes, side, side, generator=torch.Generator().manual_seed(seed))


def saved_tokenizer(
    folder: Path, codes: int = 20, side: int = 4, grid: tuple[int, int] = (2, 3), seed: int = 0
) -> PatchVQTokenizer:
    path = folder / "codebook.safetensors"
    PatchVQTokenizer.save(path, random_codebook(codes, side, seed), grid)
    return PatchVQTokenizer(str(path))


def test_every_byte_survives_pixels_and_back() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_bytes(levels / 255), levels.to(torch.uint8))
    assert torch.equal(to_bytes(levels.double() / 255), levels.to(torch.uint8))


def test_bytes_round_half_up_and_clip() -> None:
    pixels = torch.tensor([-1.0, -0.001, 0.0, 0.49 / 255, 0.5 / 255, 1.49 / 255, 254.51 / 255, 1.0, 1.2, 40.0])
    assert to_bytes(pixels).tolist() == [0, 0, 0, 0, 1, 1, 255, 255, 255, 255]
    generator = torch.Generator().manual_seed(0)
    many = torch.rand(5000, generator=generator) * 1.2 - 0.1
    expected = [min(255, max(0, int(255 * value + 0.5 + 1000) - 1000)) for value in many.tolist()]
    assert (to_bytes(many).int() - torch.tensor(expected)).abs().max() == 0


def test_half_precision_pixels_become_the_bytes_of_their_float32_values() -> None:
    pixels = torch.rand(3, 1, 8, 8).bfloat16()
    assert torch.equal(to_bytes(pixels), to_bytes(pixels.float()))


@pytest.mark.parametrize("levels", [2, 5, 17, 256])
@pytest.mark.parametrize("shape", [(8, 8), (3, 5)])
def test_pixel_codes_come_back_and_levels_are_evenly_spaced(levels: int, shape: tuple[int, int]) -> None:
    tokenizer = PixelTokenizer(levels, shape)
    codes = torch.randint(0, levels, (6, shape[0] * shape[1]))
    codes[0] = levels - 1
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (6, 1, *shape)
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert (pixels[0] == 1).all()
    row, column = shape[0] - 1, 1
    place = row * shape[1] + column
    assert pixels[3, 0, row, column].item() == pytest.approx(codes[3, place].item() / (levels - 1))


def test_pixels_take_the_nearest_level() -> None:
    tokenizer = PixelTokenizer(17, (8, 8))
    pixels = torch.rand(20, 1, 8, 8)
    nearest = (pixels.flatten(1)[..., None] - torch.arange(17) / 16).abs().argmin(-1)
    assert torch.equal(tokenizer.encode(pixels), nearest)


def test_pixel_tokenizer_is_rebuilt_from_its_description() -> None:
    description = PixelTokenizer(17, (8, 6)).description()
    assert description["class_path"] == "elt_lightning.tokenizers.pixels.PixelTokenizer"
    again = PixelTokenizer(**description["init_args"])
    assert again.description() == description
    with pytest.raises(ValueError, match="levels"):
        PixelTokenizer(1, (8, 8))


@pytest.mark.parametrize(("side", "grid"), [(2, (3, 3)), (4, (2, 5)), (8, (5, 5)), (1, (4, 2))])
def test_patches_are_cut_row_major_and_join_again(side: int, grid: tuple[int, int]) -> None:
    pictures = torch.rand(3, 1, grid[0] * side, grid[1] * side)
    patches = cut_patches(pictures, side)
    assert patches.shape == (3, grid[0] * grid[1], side, side)
    for place in range(grid[0] * grid[1]):
        row, column = divmod(place, grid[1])
        expected = pictures[:, 0, row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert torch.equal(patches[:, place], expected)
    assert torch.equal(join_patches(patches, grid), pictures)


@pytest.mark.parametrize("seed", range(4))
def test_patch_codes_are_the_nearest_entries(tmp_path: Path, seed: int) -> None:
    tokenizer = saved_tokenizer(tmp_path, codes=30, side=4, grid=(2, 3), seed=seed)
    pictures = torch.rand(9, 1, 8, 12)
    codes = tokenizer.encode(pictures)
    assert codes.dtype == torch.int64
    for picture, row in zip(pictures.double(), codes.tolist(), strict=True):
        for place, code in enumerate(row):
            top, left = 4 * (place // 3), 4 * (place % 3)
            patch = picture[0, top : top + 4, left : left + 4]
            distances = [((patch - entry) ** 2).sum().item() for entry in tokenizer.codebook.double()]
            assert distances[code] == pytest.approx(min(distances), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_patch_codes_come_back_from_their_own_pictures(tmp_path: Path, seed: int) -> None:
    tokenizer = saved_tokenizer(tmp_path, codes=64, side=8, grid=(5, 5), seed=seed)
    codes = torch.randint(0, 64, (50, 25))
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (50, 1, 40, 40)
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert torch.equal(pixels[3, 0, 8:16, 16:24], tokenizer.codebook[codes[3, 1 * 5 + 2]])


def test_patch_tokenizer_describes_its_file_and_has_nothing_to_train(tmp_path: Path) -> None:
    tokenizer = saved_tokenizer(tmp_path)
    description = tokenizer.description()
    assert description["sha256"] == hashlib.sha256((tmp_path / "codebook.safetensors").read_bytes()).hexdigest()
    again = PatchVQTokenizer(**description["init_args"])
    assert torch.equal(again.codebook, tokenizer.codebook)
    assert again.grid == (2, 3)
    assert not list(tokenizer.parameters())


def test_a_missing_or_damaged_codebook_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        PatchVQTokenizer(str(tmp_path / "nothing.safetensors"))
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a codebook")
    with pytest.raises(UserError, match=r"garbage\.safetensors"):
        PatchVQTokenizer(str(garbage))
    saved_tokenizer(tmp_path)
    whole = (tmp_path / "codebook.safetensors").read_bytes()
    garbage.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"garbage\.safetensors"):
        PatchVQTokenizer(str(garbage))
    save_file({"weights": torch.zeros(3)}, garbage)
    with pytest.raises(UserError, match=r"garbage\.safetensors"):
        PatchVQTokenizer(str(garbage))

"""The search for the nearest training items, against a plain loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL_SQUARES
from torch import Tensor

from elt_lightning.cli import main
from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule
from elt_lightning.metrics.nearest import nearest_items

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def noise(count: int, seed: int, shape: tuple[int, ...] = (3, 4, 8, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (1, 5, 5)], ids=["clips", "pictures"])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_it_finds_what_a_plain_loop_finds(shape: tuple[int, ...], size: int) -> None:
    samples, items = noise(6, 1, shape), noise(50, 2, shape)
    found = nearest_items(samples, items.split(size))
    assert found.indices.shape == found.distances.shape == (6,)
    assert found.items.shape == (6, *shape)
    assert found.items.dtype == torch.uint8
    for sample, index, distance, chosen in zip(samples, *found, strict=True):
        errors = [float(np.mean((sample.numpy() / 255 - item.numpy() / 255) ** 2)) for item in items]
        assert index == np.argmin(errors)
        assert float(distance) == pytest.approx(min(errors))
        assert torch.equal(chosen, items[index])


def test_a_copy_is_at_distance_zero_and_the_first_of_equals_is_taken() -> None:
    items = noise(30, 3, (3, 16, 32, 32))
    items[20] = items[10] = items[11]  # in the same batch, and in a later one
    found = nearest_items(items[[11, 29]], items.split(4))
    assert found.indices.tolist() == [10, 29]
    assert found.distances.tolist() == [0, 0]
    one_off = items[11].clone()
    one_off[0, 0, 0, 0] ^= 1
    assert nearest_items(one_off[None], [items]).distances.item() == pytest.approx(1 / 255**2 / one_off.numel())


def test_what_cannot_be_compared_is_refused() -> None:
    samples = noise(2, 1)
    with pytest.raises(ValueError, match="there is no item"):
        nearest_items(samples, [])
    with pytest.raises(ValueError, match=r"expected bytes of shape \(3, 4, 8, 6\), not torch.uint8 of \(3, 4, 8, 5\)"):
        nearest_items(samples, [noise(2, 2, (3, 4, 8, 5))])
    with pytest.raises(ValueError, match=r"not torch.float32"):
        nearest_items(samples / 255, [noise(2, 2)])


def test_a_model_is_looked_at_beside_its_training_samples(
    small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `elt test --nearest`; the distances are those of a plain loop over what the tokenizer decodes."""
    monkeypatch.chdir(small_squares.parents[3])
    tested = tmp_path / "tested"
    flags = ["--nearest", "--save_samples=samples.npz", "--loops=1", f"--run_dir={tested}", *SMALL_SQUARES]
    assert main(["test", "--config", str(QUICKSTART), "--ckpt_path", str(small_squares), *flags]) == 0
    found = json.loads((tested / "nearest.json").read_text())
    data = LatinSquaresDataModule(batch_size=16, codes_per_digit=4, num_train=64, num_val=40)
    data.prepare_data()
    data.setup("fit")
    training, val = (
        np.concatenate(
            [data.tokenizer.present(data.tokenizer.decode(codes)).numpy() for codes in data.all_codes(side, 7)]
        )
        / 255
        for side in (False, True)
    )
    drawn = torch.from_numpy(np.load(tested / "samples_L1.npz")["arr_0"]).permute(0, 3, 1, 2)[:8, :1]
    samples = data.tokenizer.present(drawn / 255).numpy() / 255
    for name, values in (("distances", samples), ("distances_of_val_samples", val[:8])):
        errors = ((values[:, None] - training[None]) ** 2).mean((2, 3, 4))
        assert found[name] == pytest.approx(errors.min(1).tolist(), abs=1e-9)
    assert found["loops"] == 1
    with Image.open(tested / "nearest.png") as picture:
        assert picture.width > 3 * picture.height > 300

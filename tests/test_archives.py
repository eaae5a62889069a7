from pathlib import Path

import numpy as np
import pytest

from elt_lightning.evaluation.archives import SampleArchive


@pytest.mark.parametrize(
    ("total", "world_size", "channels"), [(1, 1, 3), (10, 1, 1), (700, 1, 3), (703, 3, 3), (2, 3, 1)]
)
def test_pictures_of_all_ranks_stand_in_order_of_their_numbers(
    tmp_path: Path, total: int, world_size: int, channels: int
) -> None:
    random = np.random.default_rng(total)
    pictures = random.integers(0, 256, (total, 4, 6, channels), dtype=np.uint8)
    labels = random.integers(0, 1000, total)
    archives = [SampleArchive(tmp_path / "a" / "samples.npz", rank, world_size) for rank in range(world_size)]
    for rank, archive in enumerate(archives):
        mine = np.arange(rank, total, world_size)
        for part in np.array_split(mine, 3) if len(mine) > 2 else [mine] * (len(mine) > 0):
            archive.add(pictures[part], labels[part])
    archives[0].finish()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["samples.npz"]
    found = np.load(tmp_path / "a" / "samples.npz", allow_pickle=False)
    assert set(found.files) == {"arr_0", "labels"}
    assert found["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(found["arr_0"], pictures)
    np.testing.assert_array_equal(found["labels"], labels)


def test_what_an_interrupted_run_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    SampleArchive(path).add(np.ones((5, 2, 2, 3), np.uint8), np.zeros(5))
    archive = SampleArchive(path)
    archive.add(np.zeros((3, 2, 2, 3), np.uint8), np.arange(3))
    archive.finish()
    assert np.load(path)["arr_0"].shape == (3, 2, 2, 3)
    assert not np.load(path)["arr_0"].any()

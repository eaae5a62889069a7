from pathlib import Path

import pytest
from small_runs import train_small_squares

from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule


@pytest.fixture(scope="session")
def latin_squares_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the codebook and the digit network of the Latin squares, made once by each process of tests."""
    root = tmp_path_factory.mktemp("latin_squares")
    LatinSquaresDataModule(root=str(root)).prepare_data()
    return root


@pytest.fixture(scope="session")
def small_squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a masked model trained for six steps on Latin squares; its data lie in the third folder above."""
    config = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    return train_small_squares(config, tmp_path_factory.mktemp("small_squares"))

from pathlib import Path

import pytest

from elt_lightning.data.latin_squares import LatinSquaresDataModule


@pytest.fixture(scope="session")
def latin_squares_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the codebook and the digit network of the Latin squares, made once per test session."""
    root = tmp_path_factory.mktemp("latin_squares")
    LatinSquaresDataModule(root=str(root)).prepare_data()
    return root

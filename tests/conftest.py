import os
from collections.abc import Generator
from pathlib import Path

import pytest
from small_runs import train_small_squares

from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="--durations counts CPU seconds of a test and its processes")


def cpu_seconds() -> float:
    """Return the CPU seconds that this process and its ended children have used."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("cpu"):
        now = cpu_seconds()
        report.duration = now - item.config.stash.get(CPU_BEFORE, now)
        item.config.stash[CPU_BEFORE] = now
    return report


CPU_BEFORE = pytest.StashKey[float]()


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

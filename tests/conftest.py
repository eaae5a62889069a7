import fcntl
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import train_small_squares
from torch import Tensor

from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule
from elt_lightning.metrics import digits

CPU_BEFORE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="durations are CPU seconds, of ended child processes too")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("cpu"):
        now = sum(os.times()[:4])
        report.duration = now - item.config.stash.get(CPU_BEFORE, now)
        item.config.stash[CPU_BEFORE] = now
    return report


@pytest.fixture(autouse=True)
def same_folder() -> Iterator[None]:
    """Fail a test that leaves the process in another folder: one that opens ``configs/…`` later would not find it."""
    before = Path.cwd()
    yield
    after = Path.cwd()
    os.chdir(before)
    assert after == before, f"the test left the process in {after}"


@pytest.fixture(scope="session", autouse=True)
def one_digit_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Train the network that reads digits once for all processes of tests: in each folder it would become the same."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "digit_network.safetensors"
    train = digits.train_digit_network

    def train_once(network: digits.DigitNetwork, *training: Tensor) -> None:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                train(network, *training)
                save_file(network.state_dict(), path)
        network.load_state_dict(load_file(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_digit_network", train_once)
        yield


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

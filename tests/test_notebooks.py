"""The notebooks run from the first cell to the last, and are kept without what they printed."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def home(latin_squares_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the notebooks find in the repository; training is a few steps, a picture few samples."""
    for name in ("configs", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(latin_squares_root, tmp_path / "data" / "latin_squares")
    monkeypatch.delenv("ELT_CHECKPOINT", raising=False)
    for name, value in {"ELT_STEPS": "2", "ELT_NUM_SAMPLES": "10", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def execute(book: NotebookNode, folder: Path) -> str:
    """Run a notebook in ``folder / "notebooks"``; give all that it printed."""
    client = NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder / "notebooks"}}
    )
    client.execute()
    return "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))


def number_of_pictures(book: NotebookNode) -> int:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["01_any_time_inference.ipynb", "02_reading_the_loops.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
def test_both_notebooks_run(home: Path) -> None:
    """The first trains; the second goes on with its checkpoint."""
    first, second = (nbformat.read(home / "notebooks" / path.name, as_version=4) for path in NOTEBOOKS)
    printed = execute(first, home)
    assert "trained 2 steps" in printed
    assert "66,945 parameters in the looped layers" in printed  # β of recall beside the layers
    assert "4 loops late" in printed
    assert number_of_pictures(first) >= 1
    written = (home / "runs" / "notebooks" / "checkpoints" / "last.ckpt").resolve().stat().st_mtime_ns

    printed = execute(second, home)
    assert "trained" not in printed
    assert "largest difference: 0.0\n" in printed
    assert "L = 6:" in printed
    assert number_of_pictures(second) == 4
    assert (home / "runs" / "notebooks" / "checkpoints" / "last.ckpt").resolve().stat().st_mtime_ns == written


@pytest.mark.slow
def test_without_widgets_there_is_a_row_for_each_loop_count(home: Path) -> None:
    """A slider draws its picture in a widget; the plain loop draws five in the page, beside the first cell's four."""
    book = nbformat.read(home / "notebooks" / NOTEBOOKS[0].name, as_version=4)
    book.cells.insert(0, new_code_cell("import sys; sys.modules['ipywidgets'] = None"))
    execute(book, home)
    assert number_of_pictures(book) == 4 + 5 + 1

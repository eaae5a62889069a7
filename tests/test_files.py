import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elt_lightning.files import claim_numbered, next_numbered, sha256, written_aside


def crash_while_writing(path: Path, error: BaseException) -> None:
    with written_aside(path) as aside:
        aside.write_text("half of the new te")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_crash_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(type(error)):
        crash_while_writing(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_crash_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"):
        crash_while_writing(tmp_path / "deep" / "report.json", OSError("full"))
    assert os.listdir(tmp_path / "deep") == []


def test_the_new_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "table.csv"
    for content in ("first", "second"):
        with written_aside(str(path)) as aside:
            assert aside.parent == path.parent
            assert aside.suffix == ".csv"
            assert aside != path
            aside.write_text(content)
            assert (path.read_text() if path.exists() else "") != content
        assert path.read_text() == content
        assert os.listdir(path.parent) == ["table.csv"]
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with written_aside(tmp_path / "x.txt") as first, written_aside(tmp_path / "x.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x.txt").read_text() == "first"


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    program = f"from elt_lightning.files import write_text; write_text({str(tmp_path / 'x')!a}, '10\\u2079 \\xb1')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | ascii_only, check=True)
    assert (tmp_path / "x").read_bytes() == "10⁹ ±".encode()


@pytest.mark.parametrize("content", [b"", b"abc", os.urandom(3_000_000)])
def test_sha256_is_that_of_the_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_numbers_go_on_above_the_highest(tmp_path: Path) -> None:
    assert next_numbered(tmp_path / "missing", "fit") == tmp_path / "missing" / "fit_0"
    assert next_numbered(tmp_path, "fit") == tmp_path / "fit_0"
    for name in ("fit_0", "fit_2", "fit_10", "fit_x", "fit_", "fit_3_4", "test_40", "refit_50", "fit_12a"):
        (tmp_path / name).mkdir()
    assert next_numbered(str(tmp_path), "fit") == tmp_path / "fit_11"
    assert next_numbered(tmp_path, "test") == tmp_path / "test_41"


def test_the_numbers_of_files_count_as_well(tmp_path: Path) -> None:
    """A run's further configs are called config_fit_0.yaml, config_fit_1.yaml, …: none may replace another."""
    for number in range(3):
        path = next_numbered(tmp_path, "config_fit").with_suffix(".yaml")
        assert not path.exists()
        path.touch()
        assert path.name == f"config_fit_{number}.yaml"


def test_folders_asked_for_at_once_are_all_different(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim_numbered(tmp_path / "runs", "fit"), range(40)))
    assert len(set(folders)) == 40
    assert all(folder.is_dir() for folder in folders)

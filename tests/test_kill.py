"""SIGKILL at random moments: whatever was killed goes on, and ends with what an uninterrupted run ends with.

Processes are forked from one that has imported everything, and compute on one thread, so that results are compared bit
for bit. Moments are drawn, with a fixed seed, from the time that an uninterrupted run took.
"""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import write_class_folders
from processes import kill_group, start
from small_runs import SMALL
from test_command_line import assert_same
from video_files import write_ucf101

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
FIT = ["fit", "--config", str(DIGITS), *SMALL, "--trainer.accelerator=cpu", "--trainer.max_steps=40"]
FIT += ["--trainer.val_check_interval=12", "--checkpoint.every_n_train_steps=2", "--data.init_args.num_workers=1"]
FIT += ["--data.init_args.root=../digits", "--run_dir=run"]
LAST = "run/checkpoints/last.ckpt"


def run_whole(arguments: list[str], folder: Path) -> float:
    """Run to the end; give the seconds that it took."""
    began = time.monotonic()
    process = start(arguments, folder, folder / "log.txt")
    process.join(120)
    kill_group(process)
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    return time.monotonic() - began


def run_killed(
    arguments: Callable[[], list[str]],
    folder: Path,
    kills: int,
    seconds: float,
    check: Callable[[], None],
    is_done: Callable[[], bool] = lambda: False,
) -> None:
    """Begin again and again; kill the first runs at random moments, look at what they left, and let the last end."""
    moments = random.Random(0)
    done = 0
    while done < kills:
        process = start(arguments(), folder, folder / "log.txt")
        process.join(seconds * moments.uniform(0.05, 0.95))
        if process.exitcode is not None:  # it came to its end before
            assert process.exitcode == 0, (folder / "log.txt").read_text()
            return
        kill_group(process)
        done += 1
        check()
        if is_done():  # killed after its last result: a folder with results is not taken again
            return
    run_whole(arguments(), folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def trained(home: Path) -> tuple[Path, float]:
    """A folder with an uninterrupted run, and the seconds that it took."""
    folder = home / "trained"
    folder.mkdir()
    return folder, run_whole(FIT, folder)


def test_killed_training_goes_on_to_the_same_weights(home: Path, trained: tuple[Path, float]) -> None:
    """The loader process is killed with its parent; whatever lies under the name of a checkpoint is whole."""
    whole, seconds = trained
    folder = home / "killed"
    folder.mkdir()
    steps = []

    def check() -> None:
        for path in folder.glob("run/checkpoints/[!.]*.ckpt"):
            found = torch.load(path, weights_only=True)
            assert found["global_step"] == found["ema"]["updates"]
            if path.name == "last.ckpt":
                steps.append(found["global_step"])

    def arguments() -> list[str]:
        return [*FIT, *([f"--ckpt_path={LAST}"] if (folder / LAST).exists() else [])]

    run_killed(arguments, folder, 10, seconds, check)
    assert steps == sorted(steps)
    expected, found = (torch.load(where / LAST, weights_only=True) for where in (whole, folder))
    assert found["global_step"] == 40
    for name in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert_same(expected[name], found[name])
    assert not list(folder.glob("run/checkpoints/.*"))


def loader_processes(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in children.read_text().split()]


def test_a_loader_process_ends_when_its_parent_is_killed(home: Path, trained: tuple[Path, float]) -> None:
    folder = home / "orphan"
    folder.mkdir()
    process = start([*FIT, "--trainer.max_steps=4000"], folder, folder / "log.txt")
    try:
        latest = time.monotonic() + 60
        while not (folder / LAST).exists() and time.monotonic() < latest:
            time.sleep(0.01)
        assert process.pid is not None
        loaders = loader_processes(process.pid)
        assert loaders
        os.kill(process.pid, SIGKILL)
        process.join()
        while any(is_running(loader) for loader in loaders) and time.monotonic() < latest + 60:
            time.sleep(0.1)
        assert not any(is_running(loader) for loader in loaders)
    finally:
        kill_group(process)


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_sweep_is_run_again_in_the_same_place(home: Path, trained: tuple[Path, float]) -> None:
    folder, _ = trained
    test = ["test", f"--ckpt_path={LAST}", "--trainer.accelerator=cpu", "--save_samples=samples.npz"]
    test += ["--num_samples=150", "--loop_metrics.batch_size=10"]
    predict = ["predict", f"--ckpt_path={LAST}", "--trainer.accelerator=cpu", "--num_samples=400"]
    predict += ["--samples.batch_size=10"]
    for arguments, results in ((test, [f"samples_L{loops}.npz" for loops in (1, 2, 3, 4)]), (predict, ["samples.npz"])):
        seconds = run_whole([*arguments, f"--run_dir={arguments[0]}_whole"], folder)
        killed = folder / f"{arguments[0]}_killed"

        def check(killed: Path = killed, results: list[str] = results) -> None:
            for name in results:
                if (killed / name).exists():
                    assert np.load(killed / name)["arr_0"].shape[1:] == (8, 8, 1)

        last = killed / ("loops.json" if arguments is test else "samples.npz")
        again = [*arguments, f"--run_dir={killed}"]
        run_killed(lambda again=again: again, folder, 3, seconds, check, last.exists)  # type: ignore[misc]
        for name in results:
            whole, found = (np.load(folder / f"{arguments[0]}_{how}" / name) for how in ("whole", "killed"))
            assert np.array_equal(whole["arr_0"], found["arr_0"])
            assert np.array_equal(whole["labels"], found["labels"])
    rows = [json.loads((folder / f"test_{how}/loops.json").read_text())["rows"] for how in ("whole", "killed")]
    assert [row["metrics"] for row in rows[0]] == [row["metrics"] for row in rows[1]]


def encode_imagenet(folder: Path) -> list[str]:
    write_class_folders(folder / "pictures", per_class=120)
    settings = ["--tokenizer=pixels", "--size=16", "--mirrored", "--samples_per_shard=7", "--num_workers=1"]
    return ["encode", "imagenet", f"--root={folder / 'pictures'}", *settings]


def encode_ucf101(folder: Path) -> list[str]:
    root, annotations = write_ucf101(folder / "videos", [20 + number % 7 for number in range(12)])
    (folder / "levels.txt").write_text("64")
    tokenizer = ["--tokenizer=test_encode_ucf101.Brightness", f"--tokenizer_path={folder / 'levels.txt'}"]
    where = [f"--root={root}", f"--annotations={annotations}", "--num_workers=1"]
    return ["encode", "ucf101", *where, *tokenizer, "--split=all", "--size=16", "--samples_per_shard=2"]


@pytest.mark.parametrize("make", [encode_imagenet, encode_ucf101], ids=["imagenet", "ucf101"])
def test_killed_encoding_goes_on_to_the_same_shards(make: Callable[[Path], list[str]], tmp_path: Path) -> None:
    arguments = make(tmp_path)
    seconds = run_whole([*arguments, "--output=whole"], tmp_path)
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def check() -> None:
        for path in killed.glob("[0-9]*.tar"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
        assert not (killed / "index.json").exists() or len(visible(killed)) == len(visible(whole))

    run_killed(lambda: [*arguments, "--output=killed"], tmp_path, 5, seconds, check)
    assert visible(killed) == visible(whole)
    assert not list(killed.glob(".*"))


def visible(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}

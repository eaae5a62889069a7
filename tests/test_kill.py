"""SIGKILL at random moments: whatever was killed goes on, and ends with what an uninterrupted run ends with.

There are 26 kills of processes that are running: 10 of training, 3 of a test sweep, 3 of predict, 5 of encoding
pictures and 5 of encoding videos; beside them one parent of a loader process, and two loader processes.

Processes are forked from one that has imported everything, and compute on one thread, so that results are compared bit
for bit. Moments are drawn, with a fixed seed, from the time that an uninterrupted run took.
"""

import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import write_class_folders
from processes import kill_group, start
from safetensors.torch import save_file
from small_runs import SMALL
from test_command_line import assert_same
from video_files import write_ucf101

from elt_lightning.metrics.digits import DigitNetwork

pytestmark = pytest.mark.slow

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
FIT = ["fit", "--config", str(DIGITS), *SMALL, "--trainer.accelerator=cpu", "--trainer.max_steps=16"]
FIT += [
    "--trainer.val_check_interval=6",
    "--trainer.limit_val_batches=2",
    "--checkpoint.every_n_train_steps=2",
    "--data.init_args.num_workers=1",
]
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


def kill_and_go_on(
    kills: int,
    seconds: float,
    name: str,
    home: Path,
    arguments: Callable[[Path], list[str]],
    check: Callable[[Path], None],
    compare: Callable[[Path], None],
    is_done: Callable[[Path], bool] = lambda folder: False,
) -> None:
    """Kill so many running processes at random moments, and after each begin again where it was.

    Runs in one folder are a series. It ends with a run that comes to its end, before its kill or because there are no
    kills left; then another begins in a fresh folder, until there were enough kills.

    Args:
        kills: how many.
        seconds: what an uninterrupted run takes.
        name: of the folders.
        home: where they are made.
        arguments: give the command line of the next run in a folder.
        check: looks at what a killed run left in a folder.
        compare: looks at a folder whose series has ended.
        is_done: says whether a run was killed after its last result: a folder with results is not taken again.
    """
    moments = random.Random(0)
    done = series = 0
    while done < kills:
        series += 1
        folder = home / f"{name}_{series}"
        folder.mkdir()
        goes_on = True
        while goes_on:
            process = start(arguments(folder), folder, folder / "log.txt")
            process.join(seconds * moments.uniform(0.05, 0.95) if done < kills else 120)
            kill_group(process)
            if process.exitcode == -SIGKILL and done < kills:
                done += 1
                check(folder)
                goes_on = not is_done(folder)
            else:
                assert process.exitcode == 0, (folder / "log.txt").read_text()
                goes_on = False
        compare(folder)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a digit network, which need not have learned anything.

    When times are taken, the process that all others are forked from has imported everything.
    """
    folder = tmp_path_factory.mktemp("kill")
    (folder / "digits").mkdir()
    save_file(DigitNetwork().state_dict(), folder / "digits" / "digit_network.safetensors")
    run_whole(["--version"], folder)
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> tuple[Path, float]:
    """A folder with an uninterrupted run, and the seconds that it took."""
    folder = home / "trained"
    folder.mkdir()
    return folder, run_whole(FIT, folder)


def test_killed_training_goes_on_to_the_same_weights(home: Path, trained: tuple[Path, float]) -> None:
    """The loader process is killed with its parent; whatever lies under the name of a checkpoint is whole."""
    whole, seconds = trained
    steps: dict[Path, list[int]] = defaultdict(list)

    def check(folder: Path) -> None:
        for path in folder.glob("run/checkpoints/[!.]*.ckpt"):
            found = torch.load(path, weights_only=True)
            assert found["global_step"] == found["ema"]["updates"]
            if path.name == "last.ckpt":
                steps[folder].append(found["global_step"])
        assert steps[folder] == sorted(steps[folder])

    def arguments(folder: Path) -> list[str]:
        return [*FIT, *([f"--ckpt_path={LAST}"] if (folder / LAST).exists() else [])]

    def compare(folder: Path) -> None:
        expected, found = (torch.load(where / LAST, weights_only=True) for where in (whole, folder))
        assert found["global_step"] == 16
        for name in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
            assert_same(expected[name], found[name])
        assert not list(folder.glob("run/checkpoints/.*"))

    kill_and_go_on(10, seconds, "killed", home, arguments, check, compare)


def loader_processes(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in children.read_text().split()]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    latest = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.01)


def test_a_loader_process_ends_when_its_parent_is_killed(home: Path, trained: tuple[Path, float]) -> None:
    folder = home / "orphan"
    folder.mkdir()
    process = start([*FIT, "--trainer.max_steps=4000"], folder, folder / "log.txt")
    try:
        wait_for((folder / LAST).exists)
        assert process.pid is not None
        loaders = loader_processes(process.pid)
        assert loaders
        os.kill(process.pid, SIGKILL)
        process.join()
        wait_for(lambda: not any(is_running(loader) for loader in loaders))
    finally:
        kill_group(process)


@pytest.mark.parametrize("command", ["fit", "encode"])
def test_the_end_of_a_loader_process_is_one_clear_line(command: str, home: Path) -> None:
    """As where memory is full; what was finished before is whole."""
    folder = home / f"{command}_without_loader"
    folder.mkdir()
    if command == "fit":
        # Without validation: of a process that ends while another is forked Python itself complains.
        longer = ["--trainer.max_steps=4000", "--trainer.limit_val_batches=0", "--data.init_args.num_workers=2"]
        arguments, finished = [*FIT, *longer], folder / LAST
    else:
        slowly = ["--output=out", "--batch_size=1", "--samples_per_shard=1"]
        arguments, finished = [*encode_imagenet(folder), *slowly], folder / "out/00000.json"
    process = start(arguments, folder, folder / "log.txt")
    try:
        wait_for(finished.exists)
        assert process.pid is not None
        os.kill(loader_processes(process.pid)[0], SIGKILL)
        process.join(60)
    finally:
        kill_group(process)
    log = (folder / "log.txt").read_text()
    assert process.exitcode == 2, log
    assert log.count("elt: error: a loader process was lost (") == 1
    assert "Traceback" not in log
    if command == "fit":
        assert torch.load(finished, weights_only=True)["global_step"] % 2 == 0
        assert not list(folder.glob("run/checkpoints/.*"))


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


SWEEPS = {
    "test": (
        [
            "--save_samples=samples.npz",
            "--num_samples=60",
            "--loop_metrics.batch_size=10",
            "--trainer.limit_test_batches=2",
        ],
        "loops.json",
    ),
    "predict": (["--num_samples=160", "--samples.batch_size=10"], "samples.npz"),
}
"""Commands with their settings, and what they write last."""


@pytest.mark.parametrize("command", SWEEPS)
def test_a_killed_sweep_is_run_again_in_the_same_place(command: str, home: Path, trained: tuple[Path, float]) -> None:
    settings, last = SWEEPS[command]
    arguments = [command, f"--ckpt_path={trained[0] / LAST}", "--trainer.accelerator=cpu", *settings]
    whole = home / f"{command}_whole"
    whole.mkdir()
    seconds = run_whole([*arguments, "--run_dir=run"], whole)

    def check(folder: Path) -> None:
        for path in folder.glob("run/samples*.npz"):
            assert np.load(path)["arr_0"].shape[1:] == (8, 8, 1)

    def compare(folder: Path) -> None:
        results = sorted(path.name for path in whole.glob("run/samples*.npz"))
        assert len(results) == (4 if command == "test" else 1)
        for name in results:
            expected, found = (np.load(where / "run" / name) for where in (whole, folder))
            assert np.array_equal(expected["arr_0"], found["arr_0"])
            assert np.array_equal(expected["labels"], found["labels"])
        if command == "test":
            tables = [json.loads((where / "run/loops.json").read_text())["rows"] for where in (whole, folder)]
            assert [row["metrics"] for row in tables[0]] == [row["metrics"] for row in tables[1]]

    def is_done(folder: Path) -> bool:
        return (folder / "run" / last).exists()

    again = [*arguments, "--run_dir=run"]
    kill_and_go_on(3, seconds, f"{command}_killed", home, lambda folder: again, check, compare, is_done)


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
    whole = tmp_path / "whole"

    def check(folder: Path) -> None:
        killed = folder / "out"
        for path in killed.glob("[0-9]*.tar"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
        assert not (killed / "index.json").exists() or len(visible(killed)) == len(visible(whole))

    def compare(folder: Path) -> None:
        assert visible(folder / "out") == visible(whole)
        assert not list(folder.glob("out/.*"))

    kill_and_go_on(5, seconds, "killed", tmp_path, lambda folder: [*arguments, "--output=out"], check, compare)


def visible(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}

"""Trainings that go on: with which settings, from where, and how far."""

from pathlib import Path
from typing import Any

import pytest
import torch

from elt_lightning.cli import main


@pytest.fixture(autouse=True)
def _at_home(small_squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_squares.parents[3])


def resume(checkpoint: Path, run_dir: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    """Go on from a checkpoint in a new folder, and read the last checkpoint that is written there."""
    assert main(["fit", f"--ckpt_path={checkpoint}", f"--run_dir={run_dir}", *flags]) == status
    content: dict[str, Any] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@pytest.mark.slow
def test_settings_given_for_going_on_are_used_and_recorded_and_epochs_end_where_they_should(
    small_squares: Path, tmp_path: Path
) -> None:
    """The checkpoint is of step 6, in the middle of the second of four-step epochs; at a rate of 0 no weight moves."""
    before = torch.load(small_squares, weights_only=True)
    optimizer = "--model.optimizer.init_args"
    flags = [f"{optimizer}.lr=0.0", f"{optimizer}.betas=[0.5,0.75]", f"{optimizer}.weight_decay=0.25"]
    flags += ["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--data.init_args.micro_batch_size=8"]
    after = resume(small_squares, tmp_path, *flags)
    assert (before["global_step"], after["global_step"], after["epoch"]) == (6, 12, 2)
    for name, weight in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], weight)
    groups = after["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in groups] == [
        (0.0, (0.5, 0.75), 0.25),
        (0.0, (0.5, 0.75), 0.0),
    ]
    recorded = after["elt"]["model"]["optimizer"]["init_args"]
    assert (recorded["lr"], recorded["betas"], recorded["weight_decay"]) == (0.0, [0.5, 0.75], 0.25)
    progress = after["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert (progress["total"]["completed"], progress["current"]["completed"]) == (24, 8)  # in micro-batches of now


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.val_check_interval=00:01:00:00", "--checkpoint.monitor=train/los"],
        [
            "--trainer.val_check_interval=2",
            "--trainer.callbacks=EarlyStopping",
            "--trainer.callbacks.monitor=train/los",
        ],
    ],
)
def test_a_value_to_monitor_that_training_never_logs_is_complained_of_after_saving(
    flags: list[str], small_squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--trainer.max_steps=8", "--trainer.max_time=00:01:00:00"]
    assert resume(small_squares, tmp_path, *flags, status=2)["global_step"] == 8
    said = capsys.readouterr()
    assert "--trainer.max_time counts the time before the checkpoint too: " in said.out
    assert "nothing was logged as train/los" in said.err
    assert f"step 8 is saved, go on with --ckpt_path {tmp_path}/checkpoints/last.ckpt" in said.err

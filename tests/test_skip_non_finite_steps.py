"""Steps that are not finite: what they leave alone, how they are counted, when they end the training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from small_runs import SMALL
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elt_lightning.cli import main
from elt_lightning.errors import UserError
from elt_lightning.training.checkpointing import Checkpoint
from elt_lightning.training.ema import EMA
from elt_lightning.training.skip_non_finite_steps import SkipNonFiniteSteps

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
STEPS = 6


class Line(LightningModule):
    """Fits y = 2x with two weights; in chosen micro-batches its loss or its gradient is spoiled.

    Args:
        spoiled: numbers of micro-batches, from 0.
        what: "gradient", or "loss", whose gradient stays finite.
        fused: whether AdamW is.
    """

    def __init__(self, spoiled: tuple[int, ...] = (), what: str = "gradient", fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.spoiled, self.what, self.fused = spoiled, what, fused
        self.seen = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layer(batch) - 2 * batch.sum(1, keepdim=True)).square().mean()
        is_spoiled = self.seen in self.spoiled
        self.seen += 1
        if not is_spoiled:
            return loss
        # The derivative of a root is infinite at 0, and that times 0 is no number; the root itself is 0.
        return loss + (math.inf if self.what == "loss" else (0 * self.layer.weight.sum()).sqrt())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)

    def train_dataloader(self) -> DataLoader[Tensor]:
        x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(x, batch_size=4)  # type: ignore[arg-type]


class History(Callback):
    """Keeps the weights after each micro-batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append(nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())


def train(
    module: Line,
    folder: Path,
    *callbacks: Callback,
    steps: int = STEPS,
    finite: SkipNonFiniteSteps | None = None,
    **more: Any,
) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[*callbacks, finite or SkipNonFiniteSteps()],
        **quiet,
        **more,
    )
    trainer.fit(module)
    return trainer


@pytest.fixture(autouse=True)
def _no_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_changes_nothing(what: str, accumulated: int, fused: bool, tmp_path: Path) -> None:
    """The third step is spoiled, in the first of its micro-batches; a hand-written loop leaves that step out."""
    module = Line((2 * accumulated,), what, fused)
    average, finite = EMA(decay=0.5), SkipNonFiniteSteps()
    trainer = train(
        module, tmp_path, average, finite=finite, accumulate_grad_batches=accumulated, gradient_clip_val=1.0
    )
    assert trainer.global_step == STEPS
    assert finite.skipped == trainer.callback_metrics["train/skipped_steps"] == 1

    alone = Line(fused=fused)
    optimizer = alone.configure_optimizers()
    batches = iter(alone.train_dataloader())
    by_hand = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        for _ in range(accumulated):
            (alone.training_step(next(batches), 0) / accumulated).backward()
        if step == 2:
            continue
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 1.0)  # before it is clipped
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in alone.named_parameters():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * parameter.detach()
    torch.testing.assert_close(trainer.callback_metrics["train/gradient_norm"], norm.detach())
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter)
        torch.testing.assert_close(average.average[name], by_hand[name])
    moments, expected = trainer.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"]
    for number, state in expected.items():
        for name, value in state.items():
            torch.testing.assert_close(moments[number][name], value)


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_keeps_its_own_handling(what: str, fused: bool, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    module, history, finite = Line((1,), what, fused), History(), SkipNonFiniteSteps()
    train(module, tmp_path, history, finite=finite, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert torch.equal(history.weights[0], history.weights[1])
    assert not torch.equal(history.weights[1], history.weights[2])
    assert history.weights[-1].isfinite().all()
    assert finite.skipped == 1
    # It halves its scale at gradients that are not finite; of losses it knows nothing, unless the optimiser is fused.
    assert scaler.get_scale() == (8.0 if what == "loss" and not fused else 4.0)


class OtherDevice(Callback):
    """Plays the other of two devices: in the sum over both, its second step is not finite."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.reduce = self.sum  # type: ignore[assignment]

    def sum(self, tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        bad, squared_norm = tensor
        self.numbers.append(float(bad))
        return torch.stack([bad + (len(self.numbers) == 2), squared_norm])


def test_all_devices_skip_what_one_of_them_must(tmp_path: Path) -> None:
    other, history, finite = OtherDevice(), History(), SkipNonFiniteSteps()
    train(Line(), tmp_path, other, history, finite=finite)
    assert other.numbers == [0] * STEPS
    assert finite.skipped == 1
    assert torch.equal(history.weights[0], history.weights[1])


def test_too_many_in_a_row_end_the_training_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError) as ended:
        train(
            Line(tuple(range(7, 99))),
            tmp_path,
            EMA(),
            Checkpoint(every_n_train_steps=2),
            finite=SkipNonFiniteSteps(3),
            steps=30,
        )
    message = str(ended.value)
    assert all(
        word in message for word in ("step 10", "last 3 steps", "learning rate", "gradient_clip_val", "bf16-mixed")
    )
    path = Path(message.rpartition(" ")[2])
    assert path.name == "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 8
    assert all(weight.isfinite().all() for weight in content["state_dict"].values())
    assert content["callbacks"]["SkipNonFiniteSteps"] == {"skipped": 1}


def test_only_steps_in_a_row_end_the_training_and_all_are_counted_over_a_resume(tmp_path: Path) -> None:
    first = SkipNonFiniteSteps(3)
    train(Line((1, 2, 4, 5, 7, 8)), tmp_path, finite=first, steps=10)
    assert first.skipped == 6
    resumed = SkipNonFiniteSteps(3)
    resumed.load_state_dict(first.state_dict())
    train(Line((0,)), tmp_path, finite=resumed)
    assert resumed.skipped == 7


def test_before_any_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 1: the last 1 steps .* no checkpoint was written yet"):
        train(Line((0,)), tmp_path, finite=SkipNonFiniteSteps(1))


def test_weights_that_a_finite_step_broke_are_never_saved(tmp_path: Path) -> None:
    class Jump(Line):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.trainer.optimizers[0].param_groups[0]["lr"] = math.inf

    with pytest.raises(UserError, match="step 4 are not finite and are not saved"):
        train(Jump(), tmp_path, EMA(), Checkpoint(every_n_train_steps=2))
    (path,) = tmp_path.rglob("step_*.ckpt")
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 2
    assert all(weight.isfinite().all() for weight in content["state_dict"].values())


def test_the_command_line_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step makes the weights so large that no loss after it is finite."""
    settings = [*SMALL, "--model.optimizer.init_args.lr=1e38", "--loop_metrics.num_validation_samples=0"]
    settings += ["--trainer.max_steps=9", "--trainer.val_check_interval=9", "--trainer.accelerator=cpu"]
    settings += [
        "--skip_non_finite_steps.max_in_a_row=2",
        "--checkpoint.every_n_train_steps=1",
        f"--run_dir={tmp_path}",
    ]
    assert main(["fit", "--config", str(DIGITS), *settings]) == 2
    assert "training stops at step 3: the last 2 steps" in capsys.readouterr().err
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    assert all(weight.isfinite().all() for weight in content["state_dict"].values())


def test_the_limit_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="max_in_a_row"):
        SkipNonFiniteSteps(0)

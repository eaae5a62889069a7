"""The cases in which Lightning's own averaging callback falls short, and the average itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elt_lightning.errors import UserError
from elt_lightning.training.ema import EMA
from elt_lightning.training.weights import averaged_weights


class Line(LightningModule):
    """A trainable line, a frozen part and an integer buffer; remembers the weight of every step and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1, bias=False)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.after_steps: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        return (self.line(batch) - 3 * batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_steps.append(self.line.weight.item())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.line.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(count: int = 12) -> DataLoader[Tensor]:
    return DataLoader(torch.randn(count, 1) + 1, batch_size=1)


def fit(model: Line, callbacks: list[Callback], folder: Path, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **({"max_epochs": 1} | settings),
    )
    trainer.fit(model, batches(), batches(2), ckpt_path=ckpt_path)
    return trainer


def average_by_hand(initial: float, weights: list[float], decay: float) -> float:
    average = initial
    for step, weight in enumerate(weights):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * weight
    return average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_what_the_formula_says_and_is_validated(decay: float, tmp_path: Path) -> None:
    model, ema = Line(), EMA(decay)
    initial = model.line.weight.item()
    fit(model, [ema], tmp_path)
    expected = average_by_hand(initial, model.after_steps, decay)
    assert ema.average["line.weight"].item() == pytest.approx(expected, rel=1e-5)
    assert model.validated == pytest.approx([expected] * 2, rel=1e-5)
    assert model.line.weight.item() == model.after_steps[-1]


def test_raw_weights_are_validated_when_asked_for(tmp_path: Path) -> None:
    model = Line()
    fit(model, [EMA(weights="raw")], tmp_path)
    assert model.validated == [model.after_steps[-1]] * 2


def test_only_trainable_parameters_are_averaged(tmp_path: Path) -> None:
    model, ema = Line(), EMA()
    fit(model, [ema], tmp_path)
    assert set(ema.average) == {"line.weight"}
    assert model.count == 12


def test_accumulated_micro_batches_move_the_average_once(tmp_path: Path) -> None:
    model, ema = Line(), EMA()
    initial = model.line.weight.item()
    fit(model, [ema], tmp_path, accumulate_grad_batches=3)
    assert ema.updates == 4
    assert ema.average["line.weight"].item() == pytest.approx(
        average_by_hand(initial, model.after_steps[2::3], 0.999), rel=1e-5
    )


def test_the_checkpoint_holds_raw_weights_and_the_average_under_its_own_key(tmp_path: Path) -> None:
    model, ema = Line(), EMA(0.5)
    trainer = fit(model, [ema], tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert content["state_dict"]["line.weight"].item() == model.after_steps[-1]
    assert content["ema"]["weights"]["line.weight"].item() == ema.average["line.weight"].item()
    merged = averaged_weights(content)
    assert merged["line.weight"].item() == ema.average["line.weight"].item()
    assert merged["count"] == 12
    del content["ema"]
    with pytest.raises(UserError, match="--weights raw"):
        averaged_weights(content)


def test_the_average_is_float32_whatever_the_weights_are_and_goes_on_in_another_precision(tmp_path: Path) -> None:
    """In bfloat16 it would be off by some of 256 parts, and a slow one would stand still."""
    model, ema = Line(), EMA()
    initial = model.line.weight.to(torch.bfloat16).item()
    trainer = fit(model, [ema], tmp_path, precision="bf16-true")
    assert model.line.weight.dtype == torch.bfloat16
    assert ema.average["line.weight"].dtype == torch.float32
    expected = average_by_hand(initial, model.after_steps, 0.999)
    assert ema.average["line.weight"].item() == pytest.approx(expected, rel=1e-5)
    assert model.validated == [torch.tensor(expected).bfloat16().item()] * 2
    assert model.line.weight.item() == model.after_steps[-1]
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for precision in ("32-true", "bf16-true", "64-true"):
        resumed, average = Line(), EMA()
        fit(resumed, [average], tmp_path, str(tmp_path / "half.ckpt"), max_epochs=2, precision=precision)
        assert average.average["line.weight"].dtype == (torch.float64 if precision == "64-true" else torch.float32)
        expected = average_by_hand(initial, model.after_steps + resumed.after_steps, 0.999)
        assert average.average["line.weight"].item() == pytest.approx(expected, rel=1e-5)


class SaveWhileValidating(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_saved_in_the_middle_of_validation_is_not_swapped(tmp_path: Path) -> None:
    model, ema = Line(), EMA(0.5)
    fit(model, [ema, SaveWhileValidating(tmp_path / "middle.ckpt")], tmp_path)
    content = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert content["state_dict"]["line.weight"].item() == model.after_steps[-1]
    assert content["ema"]["weights"]["line.weight"].item() == ema.average["line.weight"].item()


class FailWhileValidating(Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        raise RuntimeError("the metric failed")


def test_a_failure_in_validation_leaves_the_raw_weights_in_the_model(tmp_path: Path) -> None:
    model, ema = Line(), EMA(0.5)
    with pytest.raises(RuntimeError, match="the metric failed"):
        fit(model, [ema, FailWhileValidating()], tmp_path)
    assert model.line.weight.item() == model.after_steps[-1]


def test_resuming_continues_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole_model, whole = Line(), EMA(0.9)
    first = {name: weight.clone() for name, weight in whole_model.state_dict().items()}
    torch.manual_seed(1)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    fit(whole_model, [whole, saving], tmp_path, max_epochs=2)

    resumed_model, resumed = Line(), EMA(0.9)
    resumed_model.load_state_dict(first)
    torch.manual_seed(1)
    fit(resumed_model, [resumed], tmp_path, str(tmp_path / "step=12.ckpt"), max_epochs=2)
    assert resumed.updates == whole.updates == 24
    assert resumed.average["line.weight"].item() == whole.average["line.weight"].item()


def test_a_short_run_is_not_dominated_by_its_initial_weights(tmp_path: Path) -> None:
    """After 300 steps at the trained weight, the share of the initial one is far below 0.999³⁰⁰ = 0.74."""
    average = average_by_hand(1.0, [0.0] * 300, 0.999)
    assert average < 0.01


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EMA(decay)

"""Published weights of DiT and SiT: read by `elt import`, they do what their own code does with them, number by number.

dit_sit_reference.py says how the numbers were made.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_sit_reference import (
    CLASSES,
    DEPTH,
    HEADS,
    LABELS,
    SCALE,
    SEEDS,
    SHAPE,
    STEPS,
    VALUES,
    WATCHED,
    WIDTH,
    random_dit_state,
    training_case,
)
from torch import Tensor

from elt_lightning import from_pretrained
from elt_lightning.cli import main
from elt_lightning.networks.embeddings import sine_positions
from elt_lightning.objectives.base import Corrupted
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import add_noise
from elt_lightning.training.module import ELTModule

THEIRS = json.loads(VALUES.read_text())


def file_of_weights(path: Path, change: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
    grid = (SHAPE[1] // 2, SHAPE[2] // 2)
    state = random_dit_state(2 * SHAPE[0]) | {"pos_embed": sine_positions(grid, WIDTH)[None]}
    torch.save(change(state) if change else state, path)
    return path


def elt_import(kind: str, file: Path, *flags: str) -> int:
    output = str(file.with_suffix(""))
    return main(["import", kind, "--file", str(file), "--output", output, f"--num_heads={HEADS}", *flags])


def imported(kind: str, folder: Path) -> ELTModule:
    file = file_of_weights(folder / f"{kind}.pt")
    assert elt_import(kind, file) == 0
    return from_pretrained(file.with_suffix(""))


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_whole_trajectories_are_those_of_their_code(kind: str, tmp_path: Path) -> None:
    """25 steps of p_sample_loop and of Euler's method, guided, from the same noise, in float32."""
    module = imported(kind, tmp_path)
    assert (module.sampler.steps, module.sampler.guidance.scale, module.sampler.guidance.channels) == (250, SCALE, 3)
    module.sampler.steps = STEPS
    states: list[Tensor] = []
    predict = module.predict

    def watched(x: Tensor, *arguments: Any, **settings: Any) -> Any:
        states.append(x[: len(LABELS)][WATCHED].flatten())
        return predict(x, *arguments, **settings)

    module.predict = watched  # type: ignore[method-assign]
    samples = module.sample(LABELS, 1, SEEDS).flatten()
    trajectory, expected = torch.stack(states[1:]), torch.tensor(THEIRS[kind]["steps"])
    size = expected.abs().amax(1, keepdim=True)
    assert expected.std() > 1
    assert ((trajectory - expected[:-1]) / size[:-1]).abs().max() < 1e-4
    assert (samples - torch.tensor(THEIRS[kind]["samples"])).abs().max() < 1e-4 * size[-1]


def test_the_training_loss_of_dit_is_theirs(tmp_path: Path) -> None:
    module = imported("dit", tmp_path)
    clean, noise, t = training_case()
    time = t / 1000
    noisy = add_noise(clean, noise, *module.process.amounts_at(time))  # type: ignore[attr-defined]
    corrupted = Corrupted(noisy, noise, torch.ones(4), time)
    with torch.no_grad():
        prediction = module.network(noisy, Condition(LABELS.repeat(2), time), 1).predictions[1]
    squared = (prediction[:, :4] - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(squared, torch.tensor(THEIRS["dit_training"]["mse"]), rtol=1e-5, atol=0)
    bound = module.objective.ground_truth(prediction, corrupted) - squared
    torch.testing.assert_close(bound, torch.tensor(THEIRS["dit_training"]["vb"]), rtol=1e-4, atol=1e-5)


def as_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """Lay out what their train.py saves, under DistributedDataParallel."""
    raw = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    return {"model": raw, "ema": state, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}


def test_a_checkpoint_of_their_training_gives_its_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, checkpoint = file_of_weights(tmp_path / "a.pt"), file_of_weights(tmp_path / "b.pt", as_checkpoint)
    assert elt_import("dit", plain) == elt_import("dit", checkpoint) == 0
    assert f"{DEPTH} layers of width {WIDTH}, for latents 4×4×4 of {CLASSES} classes" in capsys.readouterr().out
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other
    assert elt_import("dit", plain) == 2
    assert "add --overwrite" in capsys.readouterr().err
    raw = file_of_weights(
        tmp_path / "c.pt", lambda state: {"model": {f"module.{name}": w for name, w in state.items()}}
    )
    assert elt_import("dit", raw) == 0
    assert "tensors of model, as it holds no average" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "config.json").read_text())["weights"] == "raw"


@pytest.mark.parametrize(("kind", "dtype"), [("dit", torch.float16), ("sit", torch.bfloat16)])
def test_files_in_half_precision_and_of_the_old_format_are_read(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The table of positions is rounded in them; SiT's time is turned in full precision."""
    half = file_of_weights(tmp_path / "half.pt", lambda state: {name: w.to(dtype) for name, w in state.items()})
    weights = {name: weight.float() for name, weight in torch.load(half).items()}
    weights["pos_embed"] = torch.load(file_of_weights(tmp_path / "exact.pt"))["pos_embed"]
    full = tmp_path / "full.pt"
    torch.save(weights, full, _use_new_zipfile_serialization=False)
    assert elt_import(kind, half) == elt_import(kind, full) == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "full"))
    assert one == other


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        ({"name": "DiT-XL-2-256x256.pt"}, "of a DiT-XL-2-256x256.pt, by its flags or name: elt import dit"),
        ({"model": "DiT-XL/2"}, "of a DiT-XL/2, by its flags or name: elt import dit"),
        ({"model": "SiT-XL/2", "path_type": "GVP"}, "path_type GVP"),
        ({"path_type": "Linear", "prediction": "noise"}, "prediction noise"),
        ({"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}, None),
    ],
)
def test_the_flags_of_a_training_say_whether_it_is_of_this_kind(
    flags: dict[str, str], telling: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / flags.get("name", "a.pt")
    file = file_of_weights(name, lambda state: as_checkpoint(state) | {"args": argparse.Namespace(**flags)})
    assert elt_import("sit", file) == (2 if telling else 0)
    assert (telling or "") in capsys.readouterr().err


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (without("blocks.1.attn.proj.bias"), r"1 missing such as blocks\.1\.attn\.proj\.bias"),
        (without("pos_embed"), "no tensor 'pos_embed'"),
        (lambda state: state | {"blocks.0.norm.weight": torch.ones(2)}, r"1 extra such as blocks\.0\.norm\.weight"),
        (
            lambda state: state | {"blocks.2.mlp.fc2.weight": torch.ones(2, 2)},
            r"of another shape such as blocks\.2\.mlp\.fc2\.weight \(2, 2\), not \(32, 128\)",
        ),
        (lambda state: state | {"pos_embed": state["pos_embed"] + 1}, "pos_embed is not the table"),
        (lambda state: state | {"pos_embed": torch.ones(4)}, "no tensor 'pos_embed' of 3 dimensions"),
        (lambda state: state | {"pos_embed": torch.ones(1, 5, 64)}, r"pos_embed \(1, 5, 64\), not \(1, 4, 32\)"),
        (lambda state: state | {"x_embedder.proj.weight": torch.ones(32, 4, 2, 3)}, r"2, 3\), not \(32, 4, 2, 2\)"),
        (lambda state: state | {"x_embedder.proj.weight": torch.ones(32, 4, 0, 0)}, "no tensor 'x_embedder"),
        (
            lambda state: {name: w[:24] if name.startswith("final_layer.linear") else w for name, w in state.items()},
            "out_channels must be 4, or with a variance 8, not 6",
        ),
        (lambda state: {name: w.to(torch.float8_e4m3fn) for name, w in state.items()}, "of another type such as"),
        (lambda state: {"epoch": 3}, r"no tensor 'x_embedder\.proj\.weight'"),
        (lambda state: [1, 2], "holds a list, not named weights"),
    ],
)
def test_a_file_of_another_shape_is_refused_in_one_line(
    change: Callable[[dict[str, Tensor]], Any], telling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert elt_import("dit", file_of_weights(tmp_path / "file.pt", change)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(telling, error), error

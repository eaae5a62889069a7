"""Pictures in three lines of Python, from a checkpoint and from an exported folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

import elt_lightning
from elt_lightning.cli import main
from elt_lightning.errors import UserError
from elt_lightning.model import ELTModel
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.tokenizers.base import to_bytes
from elt_lightning.tokenizers.patch_vq import cut_patches


def test_a_loaded_model_draws_what_its_module_samples(
    small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    model = elt_lightning.load(small_squares)
    pictures = model.draw(classes=[3, 0, 3], loops=2, seed=5, steps=3)
    sampler = model.module.sampler.with_settings(steps=3)
    codes = model.module.sample(torch.tensor([3, 0, 3]), 2, sample_seeds(5, torch.arange(3)), sampler=sampler)
    expected = model.tokenizer.present(model.tokenizer.decode(codes))
    assert [np.asarray(picture).tolist() for picture in pictures] == expected[:, 0].tolist()
    assert len(model.draw()) == model.num_classes == 5

    assert main(["export", "--ckpt_path", str(small_squares), f"--output={tmp_path / 'model'}"]) == 0
    exported = elt_lightning.load(tmp_path / "model").to(device="cpu").draw(classes=[3, 0, 3], loops=2, seed=5, steps=3)
    assert [np.asarray(a).tolist() for a in exported] == [np.asarray(b).tolist() for b in pictures]


def test_what_is_given_stays_and_without_a_class_any_fits() -> None:
    model = elt_lightning.load("squares")
    clues = {(0, 0): 2, (0, 1): 5, (2, 2): 1}
    cells = [
        cut_patches(torch.from_numpy(np.array(p))[None, None, :-1, :-1], 9)[0]
        for p in model.draw(classes=[None, 0], loops=4, seed=3, given=clues)
    ]
    codes = model.clues(clues)[0]
    for picture in cells:
        for row, column in clues:
            place = 5 * row + column
            expected = to_bytes(model.tokenizer.codebook[codes[place]])
            assert torch.equal(picture[place, 1:, 1:], expected)
    with pytest.raises(UserError, match="no digit from 1 to 5"):
        model.draw(given={(0, 0): 6})
    numpys = model.draw([0], np.int64(2), steps=2, given=model.clues(clues).to(torch.uint8))
    assert numpys[0].tobytes() == model.draw([0], 2, steps=2, given=clues)[0].tobytes()


def test_too_many_samples_for_a_device_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ELTModel, "sample", run_out)
    assert main(["sample", "--model=squares", f"--output={tmp_path / 'grid.png'}"]) == 2
    assert capsys.readouterr().err == (
        "elt: error: the device's memory is too small (CUDA out of memory. Tried to allocate 2.00 GiB.)\n"
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"classes": [5]}, "the model's classes are 0 to 4, not 5"),
        ({"classes": [-1]}, "the model's classes are 0 to 4, not -1"),
        ({"classes": []}, "there is none to draw"),
        ({"seed": 2**31}, "a seed is a whole number from 0 to 2147483647, not 2147483648"),
        ({"seed": 0.5}, "a seed is a whole number"),
        ({"steps": 2.5}, "steps must be a whole number from 1 up, not 2.5"),
        ({"carry_state": "false"}, "carry_state is true, false or null, not 'false'"),
        ({"weak_loops": 2}, "weak_loops alone changes nothing"),
        ({"given": torch.zeros(2, 25, dtype=torch.int64)}, "has the shape .2, 25., the samples .5, 25."),
        ({"given": torch.zeros(25, dtype=torch.int64)}, "has the shape .25,., the samples"),
        ({"given": torch.full((1, 25), 21)}, "codes from 0 to 19, and 20 where nothing is"),
        ({"given": torch.zeros(1, 25)}, "codes from 0 to 19"),
        ({"given": {(0, 0): 6}}, "no digit from 1 to 5"),
        ({"given": {(0, 0): 1.5}}, "whole numbers, not .0, 0.: 1.5"),
        ({"given": {(0.0, 1.0): 1}}, "whole numbers, not .0.0, 1.0.: 1"),
        ({"given": {0: 3}}, "{.row, column.: digit}, whole numbers, not 0: 3"),
        ({"given": [3]}, "what is given is of given"),
        ({"classes": 3}, "classes are a list of numbers"),
        ({"guidance": "2"}, "guidance is a number, not '2'"),
        ({"exit_scale": None}, "exit_scale is a number, not None"),
        ({"tolerance": "0.1"}, "tolerance is a number, not '0.1'"),
        ({"loops": 10**7}, "loops must be at most 1000000"),
        ({"loops": "auto"}, "a tolerance must say when"),
        ({"loops": 0}, "loop"),
        ({"loops": 2.0}, "loops must be a whole number from 1 up, or 3 of them, one per sampling step, not 2.0"),
        ({"loops": "2"}, "loops must be a whole number from 1 up"),
        ({"exit_scale": 1, "weak_loops": 1.5}, "weak_loops is a whole number, not 1.5"),
        ({"stepps": 3}, "no such setting"),
        ({"carry_state": True}, "carry_state needs a network with recall"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    asked: dict[str, object], message: str, small_squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    with pytest.raises(UserError, match=message):
        elt_lightning.load(small_squares).draw(**asked)  # type: ignore[arg-type]


def test_weights_are_one_of_two_kinds(small_squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt kind would else be taken for the raw ones."""
    monkeypatch.chdir(small_squares.parents[3])
    for source in (small_squares, "squares"):
        with pytest.raises(UserError, match="weights are ema or raw, not 'EMA'"):
            elt_lightning.load(source, weights="EMA")  # type: ignore[arg-type]

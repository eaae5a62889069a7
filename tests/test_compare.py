"""`elt compare`: seeds of one config are one curve, settings of the sampler have their own; errors are one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from elt_lightning.cli import main
from elt_lightning.commands.compare import curves_of


def write_run(folder: Path, seed: int, scores: dict[int, float], recall: bool = False, **row: Any) -> Path:
    """A run's folder as `elt fit` and `elt test` leave it, with a sweep of these scores."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "trainer": {"default_root_dir": str(folder)},
        "model": {"recall": recall, "seed": seed},
        "data": {"init_args": {"seed": seed}},
        "run_dir": str(folder),
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    write_sweep(folder / "test", [{"loops": loops, "score": score, **row} for loops, score in scores.items()])
    return folder


def write_sweep(folder: Path, rows: list[dict[str, Any]], **measured: Any) -> None:
    folder.mkdir(parents=True)
    laid_out = []
    for row in rows:
        metrics = {"valid": {"mean": row.pop("score")}}
        laid_out.append({"params_backbone": 10, "macs_per_sample": 10**9 * row["loops"], "metrics": metrics} | row)
    sweep = {"primary_metric": "valid", "higher_is_better": True, "train_loops": 4, "rows": laid_out}
    sweep |= measured
    (folder / "loops.json").write_text(json.dumps(sweep))


def test_runs_that_differ_in_their_seed_are_one_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a_0", 0, {1: 0.25, 4: 0.5})
    second = write_run(tmp_path / "a_1", 1, {1: 0.35, 4: 0.7})
    swept = tmp_path / "swept"
    rows = [{"loops": 2, "score": 0.1 + 0.4 * carried, "carry_state": carried} for carried in (False, True)]
    write_sweep(swept, rows)
    runs = [str(first), str(second), f"ours={swept}"]
    assert main(["compare", *runs, f"--output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "compare.md").read_text().splitlines()[2:] == [
        "| a_0 and 1 more | 10 | 30.0 ± 7.1 |  | 60.0 ± 14.1 |",
        "| ours, carry_state False | 10 |  | 10.0 |  |",
        "| ours, carry_state True | 10 |  | 50.0 |  |",
    ]
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    assert "60.0 ± 14.1" in capsys.readouterr().out


def test_what_was_measured_otherwise_is_named_and_two_sweeps_of_a_run_are_no_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), 0, {1: 0.25})
    write_sweep(Path("a/test_2"), [{"loops": 1, "score": 0.5}], num_samples=500)
    assert main(["compare", "a/test", "a/test_2", "a/test", "--output=out"]) == 0
    expected = ["| a, num_samples None | 10 | 25.0 |", "| a, num_samples 500 | 10 | 50.0 |"]
    assert Path("out/compare.md").read_text().splitlines()[2:] == expected
    assert main(["compare", "a/test", "--output=out"]) == 2
    assert "out has a comparison: choose another --output, or add --overwrite" in capsys.readouterr().err
    assert main(["compare", "a/test", "--output=out", "--overwrite"]) == 0
    assert "num_samples" not in Path("out/compare.md").read_text()


def test_where_a_tolerance_ends_loops_a_curves_compute_is_the_mean_of_its_seeds() -> None:
    row = {"loops": 32, "params_backbone": 10, "metrics": {"valid": {"mean": 0.5}}}
    group = [("a", Path(), {"rows": [row | {"macs_per_sample": macs}]}) for macs in (100, 300)]
    assert curves_of(group, "valid")[0].macs[32] == 200


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["nowhere"], "nowhere has no loops.json of elt test"),
        (["a_0", "--metric", "fid"], "has no fid, but valid: choose a --metric that all runs have"),
        (["twice"], "twice has several sweeps, name one: twice/test, twice/test_2"),
        (["a_0/config.yaml"], "a_0/config.yaml is no loops.json of elt test"),
        (["broken"], "broken/config.yaml is no config of elt fit: "),
        (["a_0", "other/a_0"], "runs of different configs have the same name"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    runs: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a_0"), 0, {1: 0.25})
    write_run(Path("other/a_0"), 0, {1: 0.25}, recall=True)
    (write_run(Path("broken"), 0, {1: 0.25}) / "config.yaml").write_text("model: [")
    write_run(Path("twice"), 0, {1: 0.25})
    write_sweep(Path("twice/test_2"), [{"loops": 1, "score": 0.5}])
    assert main(["compare", *runs]) == 2
    assert message in capsys.readouterr().err

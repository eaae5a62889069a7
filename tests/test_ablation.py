"""`make ablation`: runs one by one, records that another clone goes on with, and a summary of whole seeds."""

import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from processes import start
from small_runs import SMALL

from elt_lightning.cli import main
from elt_lightning.data.toy.digits import DigitsDataModule
from elt_lightning.errors import UserError
from elt_lightning.reproduce import ablation
from elt_lightning.reproduce.claims import read_experiment

ROOT = Path(__file__).parent.parent
LOOPED = {"label": "looped", "num_layers": 1, "max_loops": 2, "mode": "ilsd"}


def settings_of(flags: list[str]) -> dict[str, str]:
    return dict(flag.removeprefix("--").split("=", 1) for flag in flags)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Work in an empty folder, and note each `elt` command; commands run in processes that start soon."""
    noted: list[str] = []

    def elt(*arguments: str) -> None:
        noted.append(arguments[0])
        log = tmp_path / f"log_{len(noted)}.txt"
        process = start(arguments, tmp_path, log)
        process.join(400)
        assert process.exitcode == 0, log.read_text()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "elt", elt)
    DigitsDataModule().prepare_data()  # once for all tests, where each process would train its own digit network
    config: dict[str, Any] = {
        "config": str(ROOT / "configs" / "digits.yaml"),
        "seeds": [0, 1],
        "metrics": ["recognised", "fd_digits"],
        "settings": settings_of(SMALL)
        | {"trainer.accelerator": "cpu", "trainer.max_steps": 4, "trainer.val_check_interval": 2},
        "arms": {
            "ilsd": LOOPED | {"test_loops": [1, 2]},
            "unlooped_2": {"label": "unlooped", "num_layers": 2, "max_loops": 1, "mode": "vanilla"},
        },
    }
    Path("ablation_small.yaml").write_text(yaml.safe_dump(config))
    return noted


def run_ablation(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    path = Path("ablation_small.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    monkeypatch.setattr(sys, "argv", ["ablation", "--config", str(path), "--output", "results", "--jobs", "1"])
    ablation.main()


@pytest.mark.slow
def test_an_ablation_goes_on_in_another_clone_and_sums_up_whole_seeds(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ablation(monkeypatch, seeds=[0])
    assert commands == ["fit", "test"] * 2
    Path("runs").rename("elsewhere")  # a clone does not have it
    commands.clear()
    run_ablation(monkeypatch, seeds=[0, 1])
    assert commands == ["fit", "test"] * 2
    summary = json.loads(Path("results/ablation.json").read_text())
    assert summary["config"]["seeds"] == [0, 1]
    records = [json.loads(Path(f"results/runs/ilsd_seed{seed}.json").read_text()) for seed in (0, 1)]
    arm = summary["arms"]["ilsd"]
    assert [row["loops"] for row in arm["rows"]] == [1, 2]
    for place, row in enumerate(arm["rows"]):
        values = [record["rows"][place]["metrics"]["fd_digits"] for record in records]
        assert row["metrics"]["fd_digits"] == values
        assert len(set(values)) == 2  # seeds matter
        written = f"{mean(values):.3g} ± {stdev(values):.3g}"
        assert written in Path("results/ablation.md").read_text()
    assert arm["val"]["val/loss@L2"]["steps"] == [1, 3]
    loop = json.loads(Path("runs/ablation_small/ilsd_seed1/test/loops.json").read_text())
    assert records[1]["rows"][0]["metrics"]["fd_digits"] == loop["rows"][0]["metrics"]["fd_digits"]["mean"]
    assert Path("results/ablation.png").stat().st_size > 10_000
    seeds = ["elsewhere/ablation_small/ilsd_seed0", "runs/ablation_small/ilsd_seed1"]
    assert main(["compare", *seeds, "--output=sheet"]) == 0
    assert "| ilsd_seed0 and 1 more | " in Path("sheet/compare.md").read_text()
    found = read_experiment(Path("results"))
    assert found is not None
    assert list(found.arms["ilsd"].scores[2]) == arm["rows"][1]["metrics"]["recognised"]
    assert found.arms["ilsd"].higher_is_better
    commands.clear()
    run_ablation(monkeypatch, prepare="elt_lightning no_command")  # there is nothing to make data for
    assert commands == []
    Path("results/runs/ilsd_seed1.json").unlink()
    with pytest.raises(UserError, match="the data could not be made: python -m elt_lightning no_command"):
        run_ablation(monkeypatch)
    assert commands == []


@pytest.mark.slow
def test_what_other_settings_measured_is_not_taken(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path("own_digits.yaml")
    base.write_text((ROOT / "configs" / "digits.yaml").read_text())
    run_ablation(monkeypatch, seeds=[0], config=str(base))
    commands.clear()
    base.write_text("# Comments change nothing.\n" + base.read_text())
    run_ablation(monkeypatch)
    settings = yaml.safe_load(Path("ablation_small.yaml").read_text())["settings"]
    with pytest.raises(UserError, match=r"other settings: delete it"):
        run_ablation(monkeypatch, settings=settings | {"trainer.max_steps": 6})
    base.write_text(yaml.safe_dump(yaml.safe_load(base.read_text()) | {"seed_everything": 5}))
    with pytest.raises(UserError, match=r"other settings: delete it"):
        run_ablation(monkeypatch, settings=settings)
    record = Path("results/runs/ilsd_seed0.json")
    record.write_text(record.read_text()[:-9])
    with pytest.raises(UserError, match=r"ilsd_seed0.json was not written by `make ablation`"):
        run_ablation(monkeypatch)
    assert commands == []


@pytest.mark.slow
def test_an_error_leaves_the_summary_of_the_whole_seeds(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ablation.elt

    def fails_in_seed_1(*arguments: str) -> None:
        if arguments[arguments.index("--seed_everything") + 1] == "1":
            raise UserError("no")
        runs(*arguments)

    monkeypatch.setattr(ablation, "elt", fails_in_seed_1)
    with pytest.raises(UserError, match="no"):
        run_ablation(monkeypatch)
    assert json.loads(Path("results/ablation.json").read_text())["config"]["seeds"] == [0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"base": "configs/digits.yaml"}, "may not have base"),
        ({"seeds": None}, "lacks seeds"),
        ({"arms": {"ilsd": {"layers": 2}}}, "unexpected keyword argument 'layers'"),
        ({"arms": {"ilsd": LOOPED | {"taught": True}}}, "ilsd has taught, but no begins_at"),
        ({"arms": {"ilsd": LOOPED | {"begins_at": "deep"}}}, "begins at deep, which is no arm"),
    ],
)
def test_what_an_experiment_may_not_say_is_named(
    change: dict[str, Any], line: str, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("ablation_small.yaml")
    changed = yaml.safe_load(path.read_text()) | change
    path.write_text(yaml.safe_dump({name: value for name, value in changed.items() if value is not None}))
    monkeypatch.setattr(sys, "argv", ["ablation", "--config", str(path), "--output", "results"])
    with pytest.raises(UserError, match=line):
        ablation.main()
    assert commands == []


def test_upcycled_arms_begin_from_the_unlooped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more jobs than one they wait for it; whatever begins from nothing does not."""
    monkeypatch.chdir(tmp_path)
    noted: list[tuple[str, ...]] = []

    def elt(*arguments: str) -> None:
        noted.append(arguments)
        if arguments[0] == "fit":
            folder = Path(arguments[arguments.index("--run_dir") + 1])
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            time.sleep(0.5 * (folder.name == "unlooped_8_seed0"))

    monkeypatch.setattr(ablation, "elt", elt)
    monkeypatch.setattr(ablation, "write_record", lambda *_: None)
    monkeypatch.setattr(ablation, "write_results", lambda *_: None)
    config = yaml.safe_load((ROOT / "experiments" / "upcycling.yaml").read_text())
    config |= {"config": str(ROOT / config["config"]), "seeds": [0]}
    config["arms"] = {name: config["arms"][name] for name in ("blocks_25", "taught_25", "unlooped_8", "nothing_25")}
    Path("upcycling.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["ablation", "--config", "upcycling.yaml", "--jobs", "3"])
    ablation.main()
    fits = {Path(call[call.index("--run_dir") + 1]).name: call for call in noted if call[0] == "fit"}
    assert set(fits) == {f"{name}_seed0" for name in config["arms"]}
    assert "--init_from" not in fits["nothing_25_seed0"]
    original = "runs/upcycling/unlooped_8_seed0/checkpoints/last.ckpt"
    assert f"--model.outer_teacher.path={original}" in fits["taught_25_seed0"]
    loops = {call[call.index("--init") + 1]: call for call in noted if call[0] == "loop"}
    assert set(loops) == {"blocks", "average"}
    assert loops["blocks"][:3] == ("loop", "--from", original)
    assert fits["blocks_25_seed0"][-2:] == ("--init_from", "runs/upcycling/blocks_25_seed0/beginning")
    assert all(noted.index(fits["unlooped_8_seed0"]) < noted.index(call) for call in loops.values())
    trained = json.loads(Path("runs/upcycling/blocks_25_seed0/trained.json").read_text())
    assert trained["seconds"] < 0.25  # waiting is no training


def test_arms_that_differ_in_steps_alone_are_laid_out_over_them() -> None:
    """Others stay a point or a level of their own; without such arms nothing is laid out over steps."""
    config = yaml.safe_load((ROOT / "experiments" / "upcycling.yaml").read_text())
    arms = [arm for arm in ablation.arms_of(config) if arm.name in ("unlooped_8", "nothing", "nothing_10", "recall_25")]
    row = dict.fromkeys(ablation.COSTS, 0)
    scores = {"unlooped_8": [0.9, 0.8], "nothing": [0.7, 0.6], "nothing_10": [0.1, 0.2], "recall_25": [0.3, 0.4]}
    rows = {
        arm.name: [
            row
            | {
                "loops": loops,
                "carry_state": carried,
                "metrics": {"m": scores[arm.name] if loops > 2 or not carried else [0, 0]},
            }
            for carried in ((False, True) if arm.recall else (False,))
            for loops in arm.loops()
        ]
        for arm in arms
    }
    measured = ablation.curves({"arms": {name: {"rows": each} for name, each in rows.items()}}, arms, "m")
    over = {curve.label: curve for curve in ablation.over_steps(measured, config)}
    assert set(over) == {"unlooped 8 layers", "from nothing", "average, recall, 25 %", "average, recall, 25 %, carried"}
    assert over["from nothing"].scores.T.to_dict("list") == {240: [0.1, 0.2], 2400: [0.7, 0.6]}
    assert over["average, recall, 25 %, carried"].scores.T.to_dict("list") == {600: [0.3, 0.4]}
    assert ablation.over_steps(measured[:2], config) == []

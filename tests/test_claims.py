"""`make claims`: verdicts follow the numbers, what is missing says so, the committed page is what they give."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from elt_lightning.errors import UserError
from elt_lightning.reproduce import figures
from elt_lightning.reproduce.claims import (
    ALL,
    CLAIMS,
    EXPERIMENTS,
    SHARES,
    Claim,
    NotMeasuredError,
    cost_section,
    page,
    read_experiment,
)

RESULTS = Path(__file__).parent.parent / "docs" / "results"
FAR = [1, 2, 3, 4, 5, 6, 8, 12]

SUPPORTING: dict[str, dict[int, float]] = {
    "ilsd": dict(zip(FAR, (0.80, 0.81, 0.82, 0.83, 0.84, 0.83, 0.80, 0.60), strict=True)),
    "vanilla": dict(zip(FAR[:6], (0.10, 0.30, 0.60, 0.82, 0.70, 0.50), strict=True)),
    "ground_truth": dict.fromkeys(FAR[:6], 0.75),
    "distillation": dict.fromkeys(FAR[:6], 0.70),
    "deep_supervision": dict.fromkeys(FAR[:6], 0.70),
    "one_layer": dict.fromkeys(range(1, 11), 0.30),
    "unlooped_8": {1: 0.80},
    "ilsd_little": dict.fromkeys(FAR[:6], 0.5),
    "unlooped_8_little": {1: 0.4},
    "recall_ilsd": dict.fromkeys((1, 2, 3, 4, 8, 32), 0.9),
    "recall_deep_supervision": dict.fromkeys((1, 2, 3, 4), 0.85),
    "nothing": {4: 0.75},
} | {
    f"{way}_{share}": {4: score}
    for way, score in {"nothing": 0.6, "average": 0.8, "every_kth": 0.7, "first": 0.7, "blocks": 0.7}.items()
    for share in SHARES
}
SUPPORTING |= {f"{way}_{share}": {4: 0.85} for way in ("recall", "taught") for share in SHARES}
"""Scores at each loop count in which every claim holds."""

CARRIED = {"recall_ilsd": {1: 0.82, 2: 0.88}}
"""The same with the state carried."""

LOSSES = {"ilsd": [2.5, 2.0, 1.5], "unlooped_8": [2.5, 2.2, 2.1], "ilsd_little": [2.2], "unlooped_8_little": [2.4]}


def summary(seeds: int = 3) -> dict[str, Any]:
    """An `ablation.json` that supports every claim, in all seeds, which differ a little."""
    arms: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for name, scores in SUPPORTING.items():
        num_layers, max_loops = (1, 8) if name == "one_layer" else (8, 1) if name.startswith("unlooped") else (2, 4)
        config[name] = {"label": name, "num_layers": num_layers, "max_loops": max_loops, "mode": "ilsd"}
        rows = [
            {"loops": k, "carry_state": carried, "metrics": {"valid": [v + 0.001 * i for i in range(seeds)]}}
            for carried, measured in ((False, scores), (True, CARRIED.get(name, {})))
            for k, v in measured.items()
        ]
        losses = {
            "steps": [9, 19, 29][: len(LOSSES.get(name, []))],
            "values": [[v] * seeds for v in LOSSES.get(name, [])],
        }
        val = {f"val/loss@L{max_loops}": losses} if name in LOSSES else {}
        arms[name] = {"label": name, "training_seconds": [100.0] * seeds, "rows": rows, "val": val}
    arms["recall_ilsd"]["diversity"] = [
        {"loops": 4, "carry_state": carried, "metrics": dict.fromkeys(("recall", "coverage"), [value] * seeds)}
        for carried, value in ((False, 0.9), (True, 0.89))
    ]
    return {
        "config": {"seeds": list(range(seeds)), "arms": config},
        "arms": arms,
        "primary_metric": "valid",
        "higher_is_better": True,
        "num_samples": 10,
    }


def write(folder: Path, content: dict[str, Any], name: str = "ablation") -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "ablation.json").write_text(json.dumps(content))
    return folder / name


def verdict(claim: Claim, folder: Path, content: dict[str, Any]) -> str:
    experiment = read_experiment(write(folder, content))
    assert experiment is not None
    return claim.test(experiment).verdict()


def set_scores(content: dict[str, Any], arm: str, value: float, loops: list[int] | None = None, seed: int = -1) -> None:
    """Overwrite an arm's scores, at all loop counts or some, for all seeds or one."""
    for row in content["arms"][arm]["rows"]:
        if loops is None or row["loops"] in loops:
            values = row["metrics"]["valid"]
            row["metrics"]["valid"] = [value if seed in (-1, i) else v for i, v in enumerate(values)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.test.__name__)
def test_every_claim_holds_where_the_numbers_say_so(claim: Claim, tmp_path: Path) -> None:
    assert verdict(claim, tmp_path, summary()).startswith("holds in 3 of 3 seeds")
    assert verdict(claim, tmp_path, summary(seeds=1)) == "holds in the one seed there is"


AGAINST: list[tuple[str, list[int] | None, float]] = [
    ("vanilla", [2], 0.95),
    ("vanilla", [6], 0.9),
    ("vanilla", [4], 0.9),
    ("ilsd", [1], 0.2),
    ("ilsd", [3], 0.1),
    ("ilsd", [6], 0.1),
    ("ilsd", [12], 0.9),
    ("one_layer", [8], 0.9),
    ("ground_truth", None, 0.9),
    ("distillation", None, 0.9),
    ("unlooped_8", None, 0.9),
]
"""For the first eleven claims in order: arm, loop counts and score that speak against it."""

AGAINST_RECALL: list[tuple[str, list[int] | None, float]] = [
    ("recall_ilsd", [8], 0.5),
    ("recall_ilsd", [4], 0.5),
    ("recall_ilsd", [2], 0.5),
    ("recall_ilsd", [1], 0.3),
    ("recall_deep_supervision", None, 0.95),
]
"""The same for R1 to R5."""

AGAINST_UPCYCLING: list[tuple[str, list[int] | None, float]] = [
    ("nothing_25", None, 0.9),
    ("average_50", None, 0.7),
    ("first_50", None, 1.2),
    ("recall_10", None, 0.5),
    ("taught_25", None, 0.5),
]
"""The same for U1 to U5."""


def beyond(letter: str) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.source.startswith(f"Beyond the paper, {letter}")]


*R1_TO_R5, R6 = beyond("R")
REFUTED = [
    *zip(CLAIMS, AGAINST, strict=False),
    *zip(R1_TO_R5, AGAINST_RECALL, strict=True),
    *zip(beyond("U"), AGAINST_UPCYCLING, strict=True),
]


@pytest.mark.parametrize(("claim", "against"), REFUTED, ids=lambda value: getattr(value, "title", "")[:30])
def test_no_claim_holds_against_the_numbers(claim: Claim, against: tuple[Any, ...], tmp_path: Path) -> None:
    arm, loops, value = against
    content = summary()
    set_scores(content, arm, value, loops)
    assert verdict(claim, tmp_path, content).startswith("does not hold, in none of 3 seeds")
    content = summary()
    set_scores(content, arm, value, loops, seed=1)
    assert verdict(claim, tmp_path, content).startswith("holds in 2 of 3 seeds only")


def test_variety_is_judged_by_every_measure(tmp_path: Path) -> None:
    content = summary()
    content["arms"]["recall_ilsd"]["diversity"][1]["metrics"]["coverage"] = [0.9, 0.8, 0.9]
    assert verdict(R6, tmp_path, content).startswith("holds in 2 of 3 seeds only")


def named(title: str) -> Claim:
    return next(claim for claim in CLAIMS if title in claim.title)


def test_convergence_and_little_data_against_the_numbers(tmp_path: Path) -> None:
    content = summary()
    content["arms"]["ilsd"]["val"]["val/loss@L4"]["values"][2] = [2.1, 2.2, 2.3]  # 2.0 at the second step
    content["arms"]["ilsd"]["val"]["val/loss@L4"]["values"][1] = [2.0, 2.3, 2.3]
    experiment = read_experiment(write(tmp_path, content))
    assert experiment is not None
    finding = named("converges").test(experiment)
    assert list(finding.holds) == [True, False, False]
    assert "at step 20, never, never" in finding.measured
    content["arms"]["ilsd_little"]["val"]["val/loss@L4"]["values"] = [[2.5, 2.3, 2.5]]
    assert verdict(named("little data"), tmp_path, content).startswith("holds in 1 of 3 seeds only")


def training_rows(ilsd_seconds: list[float]) -> list[dict[str, Any]]:
    shared = {
        "shape": "small",
        "family": "masked",
        "width": 512,
        "num_layers": 4,
        "loops": 4,
        "compile": "no",
        "activation_checkpointing": False,
    }
    shared |= {"batch_size": 2, "precision": "32-true"}
    return [
        shared | {"way": "ilsd", "step_seconds": ilsd_seconds},
        shared | {"way": "vanilla", "step_seconds": [1.0, 2.0]},
    ]


@pytest.mark.parametrize(("seconds", "found"), [([1.04, 2.1], "holds"), ([1.05, 2.2], "does not hold")])
def test_cost_is_that_of_the_benchmarks(tmp_path: Path, seconds: list[float], found: str) -> None:
    assert "Not measured yet." in cost_section(tmp_path)
    run = {"device": "a machine", "device_type": "cpu", "threads": 2, "command": "elt bench train"}
    run |= {"rows": training_rows(seconds)}
    (tmp_path / "training.json").write_text(json.dumps({"runs": [run]}))
    (row,) = [line for line in cost_section(tmp_path) if line.startswith("| a machine")]
    assert row.endswith(f"| **{found}** |")


def test_distances_are_better_when_lower(tmp_path: Path) -> None:
    content = summary() | {"higher_is_better": False}
    assert verdict(named("worse than ILSD below"), tmp_path, content).startswith("does not hold")
    for row in content["arms"]["ilsd"]["rows"]:
        row["metrics"]["valid"] = [5.0 / (1 + row["loops"])] * 3
    assert "in every seed" not in verdict(named("every L"), tmp_path, content)
    assert verdict(named("every loop"), tmp_path, content).startswith("holds in 3 of 3")


def test_differences_smaller_than_their_spread_are_said_to_be(tmp_path: Path) -> None:
    content = summary()
    rows = {row["loops"]: row for row in content["arms"]["vanilla"]["rows"]}
    rows[4]["metrics"]["valid"] = [0.80, 0.82, 0.90]
    found = verdict(named("loses nothing"), tmp_path, content)
    assert found == "holds in 2 of 3 seeds only, and not on average; the difference is within the seeds' spread"
    rows[4]["metrics"]["valid"] = [0.70, 0.82, 0.84]
    assert verdict(named("loses nothing"), tmp_path, content).startswith("holds in 2 of 3 seeds only; the difference")


def test_an_arm_that_hardly_learned_is_said_to_have(tmp_path: Path) -> None:
    content = summary()
    assert "hardly" not in verdict(named("need the data"), tmp_path, content)
    set_scores(content, "distillation", 0.5, [1, 2, 3])
    set_scores(content, "distillation", 0.0, [4], seed=0)
    set_scores(content, "distillation", 0.1, [4], seed=2)
    found = verdict(named("need the data"), tmp_path, content)
    assert found.endswith("distillation: hardly learned in 2 of 3 seeds, even at its own L_max")


def test_from_which_loop_count_on_quality_is_kept(tmp_path: Path) -> None:
    content = summary()
    set_scores(content, "ilsd", 0.2, [1])
    assert verdict(named("every L"), tmp_path, content).endswith("in every seed it does from L = 2 on")


def test_what_is_missing_is_not_measured_yet(tmp_path: Path) -> None:
    empty = page(tmp_path, tmp_path)
    assert empty.count("not measured yet |") >= sum(len(claim.experiments) for claim in CLAIMS)
    assert "**" not in empty  # verdicts are bold
    content = copy.deepcopy(summary())
    del content["arms"]["vanilla"]
    write(tmp_path, content)
    with pytest.raises(NotMeasuredError):
        named("loses nothing").test(read_experiment(tmp_path / "ablation"))  # type: ignore[arg-type]
    assert "holds in 3 of 3 seeds" in page(tmp_path, tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"config": {}})
    with pytest.raises(UserError, match=r"ablation\.json"):
        page(tmp_path, tmp_path)


def test_the_committed_page_is_what_the_results_give() -> None:
    assert (RESULTS / "README.md").read_text() == page(RESULTS, RESULTS.parent.parent / "benchmarks"), (
        "run `make claims` and commit docs/results/README.md"
    )


def test_every_experiment_of_the_claims_is_listed() -> None:
    assert {name for claim in CLAIMS for name in claim.experiments} == set(EXPERIMENTS)


def test_every_experiment_is_drawn_and_run_by_name() -> None:
    assert set(figures.ABLATIONS) == set(ALL)
    files = (RESULTS.parent.parent / "experiments").glob("*.yaml")  # each is a target of the Makefile
    assert {path.stem for path in files} - {"any_time"} == EXPERIMENTS.keys()  # which lays out other runs

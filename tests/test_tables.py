"""Tables and figures: what is printed, counted and measured stays apart; everything renders without a single run."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import train_small_squares

from elt_lightning.errors import UserError
from elt_lightning.reproduce import __main__ as targets
from elt_lightning.reproduce import figures, tables
from elt_lightning.reproduce.accounting import count_row
from elt_lightning.reproduce.published import TABLE_1, TABLE_2, TABLE_4
from elt_lightning.reproduce.sweeps import rows_of

ROOT = Path(__file__).parent.parent
NUMBERS = (1, 2, 3, 4, 8)
FIGURES = (1, 4, 5, 6, 7, 8, 13, 14)


@pytest.fixture(autouse=True)
def work_in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def make_table(number: int, folder: Path, *flags: object) -> dict[str, Any]:
    """Render a table with its runs in ``folder``, and give its JSON."""
    tables.write(number, folder, folder, folder / "tables", small_scale="--small_scale" in flags)
    return json.loads((folder / "tables" / f"table{number}.json").read_text())


def write_run(folder: Path, rows: list[dict[str, Any]], test: str = "test", **changes: Any) -> None:
    """Write a ``loops.json`` as `elt test` does."""
    plain = {"guidance": 1.0, "params_total": 7, "macs_per_sample": 5_000_000_000, "effective_depth": 1}
    metrics = [
        {
            name: score if isinstance(score, dict) else {"mean": score, "std": None}
            for name, score in row["metrics"].items()
        }
        for row in rows
    ]
    report = {
        "primary_metric": next(iter(metrics[0])),
        "higher_is_better": False,
        "feature_network": "a network",
        "num_samples": 50_000,
        "train_loops": 3,
        "train_mode": "ilsd",
        "train_steps": 500_000,
        "weights": "ema",
        "sampling_steps": 24,
        "rows": [plain | row | {"metrics": scores} for row, scores in zip(rows, metrics, strict=True)],
    }
    path = folder / test / "loops.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | changes))


def size(row: Any) -> int:
    counted = count_row(row)
    assert counted is not None
    return counted.params_backbone


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("flags", [(), ("--small_scale",)])
def test_without_runs_nothing_is_measured(number: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    table = make_table(number, tmp_path, *flags)
    measured = [name for row in table["rows"] for name in row if "_measured" in name]
    assert measured
    assert all(row[name] is None for row in table["rows"] for name in row if "_measured" in name)
    assert ("small-scale twin" in table["title"]) == bool(flags)
    markdown = (tmp_path / "tables" / f"table{number}.md").read_text()
    assert markdown.startswith(f"# {table['title']}\n")
    with (tmp_path / "tables" / f"table{number}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == [row["model"] for row in table["rows"]]
    assert list(lines[0]) == list(table["rows"][0])


@pytest.mark.parametrize(("number", "rows"), [(1, TABLE_1), (2, TABLE_2), (4, TABLE_4)])
def test_what_is_printed_and_counted_is_always_there(number: int, rows: Any, tmp_path: Path) -> None:
    table = make_table(number, tmp_path)
    for row, cells in zip(rows, table["rows"], strict=True):
        counted = count_row(row)
        assert cells["params_paper"] == row.params.value
        for name in ("fid", "fvd", "inception_score", "gflops", "depth"):
            printed = getattr(row, name)
            assert cells.get(f"{name}_paper") == (printed and printed.value)
            if printed is not None and printed.spread is not None:
                assert cells[f"{name}_paper_spread"] == printed.spread
        assert cells["params_backbone_counted"] == (counted and counted.params_backbone)
        assert cells["params_total_counted"] == (counted and counted.params_total)
        assert cells["gmacs_per_sample_counted"] == (counted and counted.sample_macs / 1e9)
    text = (tmp_path / "tables" / f"table{number}.md").read_text()
    if number == 4:
        assert "| 96.4±2 |" in text
    if number == 1:
        assert re.search(r"ELT-XL 7N×4L: 5,501 GFLOPs counted, 3.9k printed \(\+41.0 %\)", text)
        assert "no way to derive" in text


SCORES = st.dictionaries(
    st.sampled_from(["fid", "fid2k", "fid8", "sfid", "sfid2k", "fd_digits", "inception_score", "valid_squares"]),
    st.floats(0.5, 400),
    min_size=1,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=SCORES, steps=st.sampled_from([24, 12]), other=st.booleans(), count=st.sampled_from([2000, 50_000]))
def test_a_measured_value_is_always_the_runs_own(
    scores: dict[str, float], steps: int, other: bool, count: int, tmp_path: Path
) -> None:
    row = TABLE_1[2]
    shutil.rmtree(tmp_path / "elt_l_8n3l", ignore_errors=True)
    measured = {"loops": 3, "params_backbone": size(row) + other, "metrics": scores}
    write_run(tmp_path / "elt_l_8n3l", [measured], sampling_steps=steps, num_samples=count)
    cells = make_table(1, tmp_path)["rows"][2]
    found = {name: value for name, value in cells.items() if "_measured" in name and value is not None}
    if other or steps != row.steps:
        assert found == {}
        return
    assert cells["fid_measured"] == scores.get("fid")
    assert ("fid2k_measured" in found) == ("fid2k" in scores and "fid" not in scores)
    assert (cells["inception_score_measured"] is not None) == ("inception_score" in scores and "fid" in scores)
    assert set(found.values()) <= set(scores.values())
    assert not [name for name in found if name.startswith(("sfid", "fd", "valid"))]


def test_the_best_guidance_scale_counts_and_spreads_are_kept(tmp_path: Path) -> None:
    common = {"loops": 3, "params_backbone": size(TABLE_1[2])}
    rows = [
        {**common, "guidance": 1.0, "metrics": {"fid": 9.5, "inception_score": 50.0}},
        {**common, "guidance": 3.0, "metrics": {"fid": {"mean": 4.25, "std": 0.125}, "inception_score": 60.0}},
        {**common, "loops": 4, "metrics": {"fid": 1.0, "inception_score": 99.0}},
    ]
    write_run(tmp_path / "elt_l_8n3l", rows)
    write_run(tmp_path / "elt_l_8n3l", [{**common, "metrics": {"fid2k": 0.5}}], test="test_quick")
    table = make_table(1, tmp_path)
    cells = table["rows"][2]
    assert (cells["fid_measured"], cells["fid_measured_spread"], cells["inception_score_measured"]) == (4.25, 0.125, 60)
    assert all(row["fid_measured"] is None for row in table["rows"] if row is not cells)
    assert "| 4.25 ± 0.12 |" in (tmp_path / "tables" / "table1.md").read_text()
    assert any("guidance 3" in note and "elt_l_8n3l/test/loops.json" in note for note in table["notes"])


def test_rows_that_were_drawn_unlike_the_papers_are_left_out_and_counted(tmp_path: Path) -> None:
    """One sweep may hold the paper's sampling beside exit guidance, a schedule of loops and other numbers of steps."""
    common = {"loops": 3, "params_backbone": size(TABLE_1[2]), "carry_state": False, "exit_scale": 0.0}
    common |= {"loop_schedule": "constant", "tolerance": None, "guidance": 1.0}
    changed = [{"exit_scale": 0.5}, {"loop_schedule": "falling"}, {"steps": 48}, {"steps": 24, "guidance": 2.0}]
    better = [
        {**common, "steps": 24, **change, "metrics": {"fid": 5.0 - place}} for place, change in enumerate(changed)
    ]
    write_run(tmp_path / "elt_l_8n3l", [*better[:3], {**better[3], "metrics": {"fid": 6.0}}], sampling_steps=48)
    table = make_table(1, tmp_path)
    assert table["rows"][2]["fid_measured"] == 6.0
    assert any("3 of its rows are left out" in note for note in table["notes"])
    assert any("3 loops, 24 sampling steps, guidance 2" in note for note in table["notes"])
    assert list(figures.read_runs(tmp_path)["value"]) == [6.0]
    write_run(tmp_path / "elt_l_8n3l", better[:2])
    table = make_table(1, tmp_path)
    assert table["rows"][2]["fid_measured"] is None
    assert any("none of its samples were drawn without carry_state, exit_scale" in note for note in table["notes"])


def test_the_two_video_rows_are_told_apart_by_loops_and_steps(tmp_path: Path) -> None:
    common = {"params_backbone": size(TABLE_4[2])}
    rows = [{**common, "loops": loops, "metrics": {"fvd": 100.0 + loops}} for loops in (4, 6)]
    papers = {"feature_network": "I3D, protocol magvit-10k×4"}
    write_run(tmp_path / "elt_6n4l", rows, sampling_steps=12, **papers)
    more_steps = [{**common, "loops": 6, "metrics": {"fvd256": 77.0}}]
    write_run(tmp_path / "elt_6n4l", more_steps, "test_24", sampling_steps=24, **papers)
    cells = make_table(4, tmp_path)["rows"]
    assert [row["fvd_measured"] for row in cells] == [None, None, 104.0, None]
    assert [row["fvd256_measured"] for row in cells] == [None, None, None, 77.0]


def test_fvd_by_another_protocol_does_not_stand_beside_the_papers(tmp_path: Path) -> None:
    row = {"params_backbone": size(TABLE_4[1]), "loops": 1}
    better = [{**row, "metrics": {"fvd": 10.0}}]
    write_run(tmp_path / "magvit_l", better, sampling_steps=12, feature_network="I3D, protocol styleganv-2048")
    table = make_table(4, tmp_path)
    assert [row["fvd_measured"] for row in table["rows"]] == [None] * 4
    assert any("left out: its protocol" in note and "styleganv-2048" in note for note in table["notes"])
    worse = [{**row, "metrics": {"fvd": 90.0}}]
    write_run(tmp_path / "magvit_l", worse, "test_2", sampling_steps=12, feature_network="I3D, protocol magvit-10k×4")
    assert [row["fvd_measured"] for row in make_table(4, tmp_path)["rows"]] == [None, 90.0, None, None]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weights": "raw"}, "raw weights"),
        ({"train_mode": "vanilla"}, "trained by vanilla"),
        ({"sampling_steps": 12}, "sampling took 12 steps, not 24"),
    ],
)
def test_a_better_run_that_is_not_the_papers_is_named_and_left_out(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    row = {"loops": 3, "params_backbone": size(TABLE_1[2])}
    write_run(tmp_path / "elt_l_8n3l", [{**row, "metrics": {"fid": 3.0}}])
    write_run(tmp_path / "elt_l_8n3l", [{**row, "metrics": {"fid": 2.0}}], "test_other", **changes)
    table = make_table(1, tmp_path)
    assert table["rows"][2]["fid_measured"] == 3.0
    assert any("test_other/loops.json is left out" in note and why in note for note in table["notes"])
    assert any("500,000 training steps, 3 loops, 24 sampling steps" in note for note in table["notes"])


def test_weights_of_unknown_training_are_said_to_be(tmp_path: Path) -> None:
    row = {"loops": 3, "params_backbone": size(TABLE_1[2]), "metrics": {"fid": 3.0}}
    write_run(tmp_path / "elt_l_8n3l", [row], train_steps=None)
    assert any("an unknown number of training steps, 3 loops" in note for note in make_table(1, tmp_path)["notes"])


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', "{}"])
def test_a_damaged_sweep_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "elt_l_8n3l" / "test" / "loops.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    for make in (make_table, make_figure):
        with pytest.raises(UserError, match=r"loops.json was not written by this version of `elt test`"):
            make(1 if make is make_table else 4, tmp_path)


def test_a_run_of_another_network_is_named_and_left_out_but_for_a_twin(tmp_path: Path) -> None:
    row = {"loops": 2, "params_backbone": 1234, "metrics": {"fid8": 3.0}}
    write_run(tmp_path / "elt_l_8n3l", [{**row, "loops": 3}], sampling_steps=4)
    table = make_table(1, tmp_path)
    assert any("left out" in note and "1,234" in note for note in table["notes"])
    assert all(value is None for row in table["rows"] for name, value in row.items() if "_measured" in name)
    write_run(tmp_path / "elt_l_12n2l", [{**row, "metrics": {"valid_squares": 0.5}}])
    twin = make_table(1, tmp_path, "--small_scale")["rows"]
    assert (twin[2]["fid8_measured"], twin[2]["params_backbone_counted"], twin[2]["fid_measured"]) == (3.0, 1234, None)
    assert twin[3]["valid_squares_measured"] == 0.5
    assert twin[0]["params_backbone_counted"] is None


def write_benchmark(path: Path, *rows: dict[str, Any], device: str = "a GPU") -> None:
    """Write rows of one run as `elt bench` does."""
    path.write_text(
        json.dumps({"runs": [{"device": device, "device_type": "cuda", "command": "elt bench", "rows": rows}]})
    )


def test_benchmarks_fill_table_3(tmp_path: Path) -> None:
    def pair(seconds: list[float], unlooped: list[float], **changes: Any) -> list[dict[str, Any]]:
        common = {"num_layers": 8, "loops": 3, "batch_size": 8, "compile": "no", "precision": "bf16-true"}
        common |= {"steps": 24, "guidance": 1.0, "samples_per_second": 6.0, "pass_share_of_peak": 0.5} | changes
        models = {"looped": seconds, "unlooped": unlooped}
        return [{**common, "model": model, "sample_seconds": times} for model, times in models.items()]

    rows = [
        *pair([2.0, 4.0, 2.0], [3.0, 6.0, 3.0], shape="L"),
        *pair([1.0] * 3, [9.0] * 3, shape="L", loops=1),  # one loop of eight layers is the same model twice
        *pair([1.0] * 3, [2.0] * 3, shape="L", batch_size=16),
        *pair([1.0] * 3, [2.5] * 3, shape="L", compile="default"),
        *pair([1.0] * 3, [1.0] * 3, shape="small", num_layers=4),
    ]
    write_benchmark(tmp_path / "inference.json", *rows)
    table = make_table(3, tmp_path)
    measured = {row["model"]: row["throughput ratio_measured"] for row in table["rows"]}
    assert measured == {
        "B: 6N×2L": None,
        "L: 8N×3L": 1.5,
        "XL: 7N×4L": None,
        "H: 8N×4L": None,
        "L: 8N×3L, batch 16, bf16-true, 24 steps, a GPU": 2.0,
        "L: 8N×3L, batch 8, bf16-true, 24 steps, torch.compile, a GPU": 2.5,
        "small: 4N×3L, batch 8, bf16-true, 24 steps, a GPU": 1.0,
    }
    assert [row["MACs ratio_counted"] for row in table["rows"][:4]] == [1.0] * 4
    assert any("a GPU" in note for note in table["notes"])
    assert any(note.startswith("L: 8N×3L is measured as L: 8N×3L, batch 8, bf16-true") for note in table["notes"])


def test_no_run_takes_the_place_of_another(tmp_path: Path) -> None:
    """A row that several runs measured is there once for each; a CPU's never stands for the paper's."""
    common = {"shape": "L", "num_layers": 8, "loops": 3, "batch_size": 8, "compile": "no", "guidance": 1.0}
    common |= {"samples_per_second": 6.0, "pass_share_of_peak": 0.5}

    def run(device: str, precision: str, seconds: float, steps: int = 24) -> dict[str, Any]:
        own = {**common, "precision": precision, "steps": steps}
        rows = [{**own, "model": "looped", "sample_seconds": [1.0]}]
        rows += [{**own, "model": "unlooped", "sample_seconds": [seconds]}]
        device_type = "cpu" if device.endswith("CPU") else "cuda"
        return {"device": device, "device_type": device_type, "command": f"elt bench {seconds}", "rows": rows}

    runs = [run("a CPU", "32-true", 0.5, steps=2), run("a CPU", "bf16-true", 6.0), run("a GPU", "bf16-true", 7.0, 12)]
    runs += [run("a GPU", "bf16-true", 2.0), run("a GPU", "bf16-true", 3.0)]
    runs += [run("a GPU", "bf16-true", 4.0), run("another GPU", "bf16-true", 5.0)]
    (tmp_path / "inference.json").write_text(json.dumps({"runs": runs}))
    rows = make_table(3, tmp_path)["rows"]
    measured = {row["model"]: row["throughput ratio_measured"] for row in rows}
    assert {model: ratio for model, ratio in measured.items() if ratio is not None} == {
        "L: 8N×3L": 2.0,
        "L: 8N×3L, batch 8, 32-true, 2 steps, a CPU": 0.5,
        "L: 8N×3L, batch 8, bf16-true, 24 steps, a CPU": 6.0,
        "L: 8N×3L, batch 8, bf16-true, 12 steps, a GPU": 7.0,
        "L: 8N×3L, batch 8, bf16-true, 24 steps, a GPU": 3.0,
        "L: 8N×3L, batch 8, bf16-true, 24 steps, a GPU, run 2": 4.0,
        "L: 8N×3L, batch 8, bf16-true, 24 steps, another GPU": 5.0,
    }


def test_benchmarks_fill_table_8(tmp_path: Path) -> None:
    common = {"shape": "wide", "num_layers": 8, "loops": 4, "compile": "no", "activation_checkpointing": False}
    common |= {"precision": "bf16-mixed", "batch_size": 32}
    ilsd = {**common, "way": "ilsd", "step_seconds": [3.0, 3.3], "peak_memory_bytes": 60}
    vanilla = {**common, "way": "vanilla", "step_seconds": [2.0, 2.2], "peak_memory_bytes": 50}
    unlooped = {**common, "way": "unlooped", "step_seconds": [2.0, 2.2], "peak_memory_bytes": 80}
    smaller = [{**row, "batch_size": 8, "peak_memory_bytes": 10} for row in (ilsd, unlooped)]
    recomputed = {**ilsd, "activation_checkpointing": True, "step_seconds": [4.0, 4.4]}
    write_benchmark(tmp_path / "training.json", *smaller, ilsd, vanilla, unlooped, recomputed)
    rows = make_table(8, tmp_path)["rows"]
    assert [row["step time ratio_measured"] for row in rows] == pytest.approx([1.5, 1.5, 1.0, 2.0])
    assert [row["peak memory ratio_measured"] for row in rows] == [0.75, 1.0, 0.625, 0.75]
    assert rows[0]["over vanilla, time ratio_measured"] == pytest.approx(1.5)
    assert rows[0]["FLOPs ratio_counted"] == pytest.approx(1, abs=0.005)
    assert rows[0]["peak memory ratio_paper"] == 0.66
    assert rows[-1]["model"] == "wide: 8N×4L, batch 32, bf16-mixed, ilsd, each loop recomputed, a GPU"


def test_a_benchmark_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inference.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="not written by `elt bench`"):
        make_table(3, tmp_path)


@pytest.mark.parametrize("number", NUMBERS)
def test_committed_tables_are_up_to_date(number: int, tmp_path: Path) -> None:
    committed = json.loads((ROOT / "docs" / "results" / "tables" / f"table{number}.json").read_text())

    def constant(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if "_measured" not in name}

    # Tables 3 and 8 have further rows, of what was measured alone.
    rows = [constant(row) for row in committed["rows"]]
    rows = [row for row in rows if any(value is not None for name, value in row.items() if name != "model")]
    assert rows == [constant(row) for row in make_table(number, tmp_path)["rows"]]


@pytest.mark.parametrize("number", [3, 8])
def test_committed_tables_of_benchmarks_are_made_of_the_committed_files(number: int, tmp_path: Path) -> None:
    tables.write(number, tmp_path, Path("benchmarks"), tmp_path, small_scale=False)
    for ending in ("md", "csv", "json"):
        name = f"table{number}.{ending}"
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "results" / "tables" / name).read_text()


def make_figure(number: int, folder: Path, **sources: Any) -> list[dict[str, str]]:
    """Render a figure, and give the lines of its CSV."""
    output = folder / "figures"
    figures.write(number, figures.Sources(**{"measured": folder} | sources), output)
    with Image.open(output / f"fig{number}.png") as picture:
        assert min(picture.size) > 200
        assert picture.convert("L").getextrema()[0] < 100  # something dark is drawn
    with (output / f"fig{number}.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames
        return list(reader)


@pytest.mark.parametrize("number", FIGURES)
def test_figures_without_runs_have_nothing_measured(number: int, tmp_path: Path) -> None:
    lines = make_figure(number, tmp_path)
    assert not [line for line in lines if line.get("source") == "measured"]
    assert (number in (4, 5, 7)) == any(line.get("source") == "paper" for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 5, 7, 8, 13])
def test_twins_draw_the_committed_ablations_alone(number: int, tmp_path: Path) -> None:
    """Each ablation in a panel of its own: runs of different lengths and tasks are not compared."""
    lines = make_figure(number, tmp_path, measured=Path("docs/results"), small_scale=True)
    assert {line["source"] for line in lines} == {"measured"}
    modes = {8: ("ilsd", "vanilla"), 13: figures.MODES}.get(number, ("ilsd",))
    for name, family in figures.ABLATIONS.items():
        summary = json.loads((ROOT / f"docs/results/{name}/ablation.json").read_text())
        metric = summary["primary_metric"]
        expected = {
            (arms["label"], row["loops"]): mean(row["metrics"][metric])
            for arm, arms in summary["arms"].items()
            for row in arms["rows"]
            if summary["config"]["arms"][arm]["mode"] in modes
            and summary["config"]["arms"][arm]["max_loops"] > 1
            and (number != 7 or family == "video")
            and (number not in (8, 13) or not (arm == "one_layer" or arm.endswith("_little")))
            and (number != 8 or "vanilla" in summary["arms"])
        }
        here = [line for line in lines if line["family"] == family]
        if number == 5:  # the best loop count of each
            assert here
            continue
        looped = [line for line in here if line["train_loops"] != "1"]
        assert {(line["series"], int(line["loops"])): float(line["value"]) for line in looped} == pytest.approx(
            expected
        )


@pytest.mark.parametrize("number", FIGURES)
@pytest.mark.parametrize("small_scale", [True, False])
def test_titles_of_twins_say_so(number: int, small_scale: bool) -> None:
    drawing, _ = figures.render(number, figures.Sources(Path("nowhere"), small_scale=small_scale))
    title = drawing.get_suptitle()
    assert title.startswith(f"Figure {number}")
    assert ("small-scale twin" in title) == small_scale


def test_figures_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each loop count at its best guidance; ways of training from folders of their own; budgets by their best."""

    def rows(name: str, *values: float) -> list[dict[str, Any]]:
        params = size(rows_of(name)[0])
        return [
            {"loops": loops, "params_backbone": params, "metrics": {"fid": value + extra}, "guidance": 1.0 + extra}
            for loops, value in enumerate(values, start=1)
            for extra in (0.5, 0.0, 1.0)
        ]

    write_run(tmp_path / "elt_l_8n3l", rows("elt_l_8n3l", 9, 5, 3, 4))
    write_run(tmp_path / "vanilla" / "elt_l_8n3l", rows("elt_l_8n3l", 30, 20, 6, 7), train_mode="vanilla")
    write_run(tmp_path / "maskgit_l", rows("maskgit_l", 4), train_loops=1, train_mode="vanilla")
    write_run(tmp_path / "elt_8n4l", rows("elt_8n4l", 8, 2), train_loops=4, sampling_steps=512)
    # What is no model of the paper, or not trained or measured as it was there, is left out.
    write_run(tmp_path / "elt_l_8n3l_24gb", rows("elt_l_8n3l", 1))
    write_run(tmp_path / "elt_l_12n2l", rows("elt_l_8n3l", 1), train_loops=2)
    write_run(tmp_path / "elt_xl_7n4l", rows("elt_xl_7n4l", 1), train_loops=4, train_mode="vanilla")
    write_run(tmp_path / "elt_4n8l", rows("elt_4n8l", 1), train_loops=8, sampling_steps=24)
    write_run(tmp_path / "elt_16n2l", rows("elt_16n2l", 1), train_loops=2, sampling_steps=512, weights="raw")
    papers_no_protocol = {"sampling_steps": 12, "feature_network": "I3D, protocol styleganv-2048"}
    write_run(tmp_path / "elt_6n4l", rows("elt_6n4l", 1), train_loops=4, **papers_no_protocol)
    measured = make_figure(8, tmp_path)
    assert {(line["family"], line["series"]) for line in measured} == {
        ("masked", "elt_l_8n3l, ILSD"),
        ("masked", "elt_l_8n3l, vanilla looping"),
        ("diffusion", "elt_8n4l, ILSD"),
    }
    masked = [float(line["value"]) for line in measured if line["series"] == "elt_l_8n3l, ILSD"]
    assert masked == [9, 5, 3, 4]
    budgets = [line for line in make_figure(5, tmp_path) if line["source"] == "measured"]
    assert {(line["family"], line["series"], float(line["value"])) for line in budgets} == {
        ("masked", "looped", 3.0),
        ("masked", "unlooped", 4.0),
        ("diffusion", "looped", 2.0),
    }
    points = figures.read_runs(tmp_path)
    front = figures.pareto_front(points)
    assert list(front["value"]) == [2.0]  # all cost the same here
    assert capsys.readouterr().out.count("is left out: ") == 6 * 3  # for each time that they were read
    assert len(make_figure(4, tmp_path)) == 21 + len(points)


def test_figures_of_a_checkpoint(tmp_path: Path, latin_squares_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    shutil.copytree(latin_squares_root, tmp_path / "data" / "latin_squares")
    checkpoint = train_small_squares(ROOT / "configs" / "quickstart.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = make_figure(1, tmp_path, ilsd=checkpoint, vanilla=checkpoint, num=2)
    assert [(line["row"], line["loops"]) for line in lines] == [
        (label, str(loops)) for label in ("ILSD", "vanilla") for loops in (1, 2, 3, 4, 5)
    ]
    (tmp_path / "ilsd").symlink_to(checkpoint.parent.parent)
    curves = make_figure(6, tmp_path, small_scale=True)
    assert {(line["metric"], line["loops"]) for line in curves} == {("valid_squares", "4")}
    norms = tmp_path / "update_norms.csv"
    norms.write_text("step,loop,update_norm\n1,1,3.0\n1,2,2.0\n2,1,1.5\n2,2,0.5\n")
    assert len(make_figure(14, tmp_path, norms=norms)) == 4


@pytest.mark.slow
def test_another_backend_of_matplotlib_is_not_in_the_way() -> None:
    command = [sys.executable, "-m", "elt_lightning.reproduce", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "junk"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_fits_a_screen_and_names_every_target() -> None:
    help_text = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert len(help_text.splitlines()) <= 24
    assert max(map(len, help_text.splitlines())) <= 120
    names = {f"table{number}" for number in NUMBERS} | {f"fig{number}" for number in FIGURES}
    assert names <= set(re.findall(r"\w+", help_text))
    assert (tuple(targets.TABLES), tuple(targets.FIGURES)) == (NUMBERS, FIGURES)


def test_variables_reach_the_program_and_unknown_ones_are_refused() -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", "-n", "-o", "pyproject.toml", "-o", "constraints.txt", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = make("table1", "VQGAN=a file", "TEST_FLAGS=--loops 3", "SMOKE=1").stdout
    assert "reproduce table 1 " in shown
    assert "--VQGAN='a file'" in shown
    assert "--TEST_FLAGS='--loops 3'" in shown
    assert shown.strip().endswith("--smoke")
    assert "there is no variable VQGN" in make("table1", "VQGN=file").stderr
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    names = re.search(r"^VARIABLES := (.*)", makefile, re.MULTILINE)
    assert names
    flags = [f"--{name.lower()}=1" for name in names[1].split()]
    assert targets.build_parser().parse_args(["imagenet", *flags])  # refuses what it does not know


def commands_of(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The commands of a dry run."""
    targets.main([*map(str, words), "--dry_run"])
    return [line.removeprefix("$ elt ") for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]


def test_what_a_table_or_figure_lacks_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def first_words(commands: list[str]) -> list[str]:
        return [command.split()[0] for command in commands]

    where = ["--RUNS", tmp_path, "--SMALL", tmp_path]  # as the Makefile has them
    assert commands_of(capsys, "figure", 8, *where) == []  # without data
    found = commands_of(capsys, "figure", 8, "--vqgan", "v", *where)
    assert first_words(found) == ["encode", "encode", "fit", "test"] * 2
    assert f"--run_dir {tmp_path}/vanilla/elt_l_8n3l" in found[6]
    assert "--model.distillation.mode=vanilla" in found[6]
    assert first_words(commands_of(capsys, "figure", 14, "--vae", "v", *where)) == ["encode", "encode", "fit"]
    (tmp_path / "UCF-101").mkdir()
    found = commands_of(capsys, "table", 4, "--ucf101", tmp_path, "--i3d", "i3d.pt", *where)
    assert first_words(found) == ["fit", "encode", "encode", "fit", "test", "sample"] * 2
    assert "--data.init_args.i3d_path=i3d.pt" in found[4]
    assert "--repeats=4" in found[4]
    for number, models in ((1, ["ilsd", "vanilla"]), (6, ["ilsd", "unlooped"]), (14, ["diffusion"])):
        found = commands_of(capsys, "figure", number, "--smoke", *where)
        assert [command.split("--run_dir ")[1] for command in found] == [f"{tmp_path}/{name}" for name in models]
    found = commands_of(capsys, "table", 8, "--smoke", *where)
    assert found[0].startswith("bench train --scale tiny,tiny_dit")


def test_a_figure_is_rendered_at_small_scale(tmp_path: Path) -> None:
    targets.main(["figure", "8", "--smoke", "--small", str(tmp_path)])
    assert (tmp_path / "figures" / "fig8.png").stat().st_size > 10_000

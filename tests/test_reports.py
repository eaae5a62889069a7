import csv
import io
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from elt_lightning.data.base import Request
from elt_lightning.errors import UserError
from elt_lightning.evaluation.pictures import loops_figure
from elt_lightning.evaluation.report import Report, picture_row
from elt_lightning.evaluation.sweep import Row, Sweep
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.samplers.base import SETTINGS
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.tokenizers.base import to_bytes
from elt_lightning.tokenizers.pixels import PixelTokenizer
from elt_lightning.training.module import ELTModule

SCORES = {
    (1, 1.0): [0.25, 0.5, 0.75],
    (1, 2.0): [0.5, 0.625, 0.75],
    (4, 1.0): [0.875, 1.0, 0.9375],
    (4, 2.0): [0.75, 0.75, 0.75],
    (2, 1.0): [0.5, 0.25, 0.0],
}


def random_pictures(count: int, channels: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, channels, 6, 5), dtype=torch.uint8)


def settings_of(scale: float) -> dict[str, Any]:
    return MaskGITSampler(MaskingProcess(5), 3, 8, guidance=Guidance(scale)).settings()


def report(higher_is_better: bool = True, repeats: int = 3, channels: int = 1, **changes: Any) -> Report:
    rows = [
        Row(
            loops,
            settings_of(scale),
            {"valid": values[:repeats], "fd_digits": [3.0] * repeats},
            macs_per_sample=1000 * loops * int(scale),
            mean_loops=loops,
            samples_per_second=50.0,
            pictures=random_pictures(3, channels),
        )
        for (loops, scale), values in SCORES.items()
    ]
    settings: dict[str, Any] = {
        "rows": rows,
        "primary_metric": "valid",
        "higher_is_better": higher_is_better,
        "feature_network": "digit_network",
        "num_samples": 700,
        "seed": 3,
        "train_loops": 4,
        "train_mode": "ilsd",
        "train_steps": 900,
        "sampling_steps": 8,
        "recall": False,
        "weights": "ema",
        "params_backbone": 1_234_567,
        "params_total": 2_345_678,
        "effective_depth": {1: 2, 2: 4, 4: 8},
    }
    return Report(**(settings | changes))


@pytest.mark.parametrize(("higher", "best"), [(True, {1: 2.0, 2: 1.0, 4: 1.0}), (False, {1: 1.0, 2: 1.0, 4: 2.0})])
def test_the_best_guidance_of_each_loop_count_follows_the_direction(higher: bool, best: dict[int, float]) -> None:
    found = report(higher)
    assert [(row.loops, row.settings["guidance"]) for row in found.best_per_loop()] == sorted(best.items())
    by_mean = {key: statistics.mean(values) for key, values in SCORES.items()}
    wanted = (max if higher else min)(by_mean, key=by_mean.__getitem__)
    chosen = found.best(found.rows)
    assert (chosen.loops, chosen.settings["guidance"]) == wanted


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("higher", [True, False])
def test_a_row_whose_score_is_not_a_number_is_never_the_best(place: int, higher: bool) -> None:
    values = [0.3, 0.6, 0.5]
    values[place] = math.nan
    rows = [Row(1, settings_of(float(scale)), {"valid": [value]}) for scale, value in enumerate(values)]
    assert (
        report(higher).best(rows).settings["guidance"]
        == (max if higher else min)((value, scale) for scale, value in enumerate(values) if not math.isnan(value))[1]
    )


def test_means_and_standard_deviations_are_over_repeats() -> None:
    for row, values in zip(report().rows, SCORES.values(), strict=True):
        assert row.mean("valid") == pytest.approx(sum(values) / 3)
        spread = math.sqrt(sum((v - sum(values) / 3) ** 2 for v in values) / 2)
        assert row.std("valid") == pytest.approx(spread)
    assert report(repeats=1).rows[0].std("valid") is None


@pytest.mark.parametrize("repeats", [1, 3])
def test_loops_json_has_the_promised_keys_and_values(tmp_path: Path, repeats: int) -> None:
    report(repeats=repeats).write(tmp_path)
    content = json.loads((tmp_path / "loops.json").read_text())
    assert set(content) == {
        "primary_metric",
        "higher_is_better",
        "feature_network",
        "num_samples",
        "parts_given",
        "seed",
        "train_loops",
        "train_mode",
        "train_steps",
        "sampling_steps",
        "recall",
        "weights",
        "rows",
    }
    assert content["primary_metric"] == "valid"
    assert content["higher_is_better"] is True
    assert content["feature_network"] == "digit_network"
    assert [content[key] for key in ("num_samples", "seed", "train_loops", "sampling_steps")] == [700, 3, 4, 8]
    assert len(content["rows"]) == len(SCORES)
    for row, ((loops, scale), values) in zip(content["rows"], SCORES.items(), strict=True):
        assert set(row) == {
            "loops",
            "effective_depth",
            *SETTINGS,
            *("mean_loops", "loops_p10", "loops_p50", "loops_p90"),
            "metrics",
            "params_backbone",
            "params_total",
            "macs_per_sample",
            "samples_per_second",
        }
        assert (row["loops"], row["guidance"], row["effective_depth"]) == (loops, scale, 2 * loops)
        assert set(row["metrics"]) == {"valid", "fd_digits"}
        assert row["metrics"]["valid"]["mean"] == pytest.approx(statistics.mean(values[:repeats]))
        std = row["metrics"]["valid"]["std"]
        assert std is None if repeats == 1 else std == pytest.approx(statistics.stdev(values))
        assert (row["params_backbone"], row["params_total"]) == (1_234_567, 2_345_678)
        assert row["macs_per_sample"] == 1000 * loops * int(scale)
        assert row["samples_per_second"] == 50.0


def test_loops_csv_says_the_same_as_loops_json(tmp_path: Path) -> None:
    report().write(tmp_path)
    rows = json.loads((tmp_path / "loops.json").read_text())["rows"]
    with (tmp_path / "loops.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        for name in ("loops", "effective_depth", "guidance", "params_backbone", "params_total", "macs_per_sample"):
            assert float(line[name]) == row[name]
        for name, value in row["metrics"].items():
            assert float(line[name]) == pytest.approx(value["mean"])
            assert float(line[f"{name}_std"]) == pytest.approx(value["std"])
        assert None not in line


def test_the_csv_shows_no_more_digits_than_were_measured(tmp_path: Path) -> None:
    """A score in float32 is not 0.145 when Python prints it whole."""
    shown = report(repeats=1)
    shown.rows[0].metrics["valid"] = [float(torch.tensor(0.145))]
    shown.write(tmp_path)
    with (tmp_path / "loops.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["valid"] == "0.145"


def test_a_single_repeat_leaves_the_deviation_of_the_csv_empty(tmp_path: Path) -> None:
    report(repeats=1).write(tmp_path)
    with (tmp_path / "loops.csv").open(newline="") as file:
        assert {line["valid_std"] for line in csv.DictReader(file)} == {""}


@pytest.mark.parametrize("channels", [1, 3])
def test_all_four_files_are_written_and_the_pictures_open(tmp_path: Path, channels: int) -> None:
    report(channels=channels).write(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "loops.csv",
        "loops.json",
        "loops.png",
        "pareto.png",
    ]
    for name in ("loops.png", "pareto.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 50


def printed(found: Report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table())
    return console.export_text()


def test_the_table_marks_the_best_guidance_only_where_it_was_swept() -> None:
    text = printed(report())
    assert "trained at 4 loops" in text
    assert "higher is better" in text
    # One star for each loop count, one in the caption.
    assert text.count("*") == 4
    assert "0.9375 ± 0.062" in text
    assert "1.235M" in text
    alone = report(rows=[row for row in report().rows if row.settings["guidance"] == 1.0])
    assert "*" not in printed(alone)
    assert "lower is better" in printed(report(higher_is_better=False))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_of_pictures_lies_side_by_side(channels: int) -> None:
    pictures, gap = random_pictures(4, channels), 2
    row = picture_row(pictures)
    assert row.shape == ((6 + gap, 4 * (5 + gap)) if channels == 1 else (6 + gap, 4 * (5 + gap), 3))
    for place, picture in enumerate(pictures):
        left = place * (5 + gap)
        shown = row[:6, left : left + 5]
        assert torch.equal(shown, picture[0] if channels == 1 else picture.permute(1, 2, 0))
        assert (row[:, left + 5 : left + 5 + gap] == 255).all()


def test_the_figure_has_one_row_of_pictures_for_each_label() -> None:
    pictures = {"L = 1": random_pictures(4), "L = 2": random_pictures(4), "L = 8": random_pictures(4)}
    figure = loops_figure(pictures, titles=["cat", "dog", "cat", "dog"])
    assert [axes.get_title() for axes in figure.axes] == ["cat", "dog", "cat", "dog", *[""] * 8]
    first_of_row, tops = figure.axes[::4], [axes.get_position().y1 for axes in figure.axes]
    assert [axes.texts[0].get_text() for axes in first_of_row] == ["L = 1", "L = 2", "L = 8"]
    assert tops == sorted(tops, reverse=True)
    for axes, picture in zip(figure.axes, torch.cat(list(pictures.values())), strict=True):
        assert np.array_equal(np.squeeze(axes.images[0].get_array()), picture.permute(1, 2, 0).squeeze(-1))


def test_the_figure_frames_right_pictures_green_and_wrong_ones_red() -> None:
    figure = loops_figure({"L = 1": random_pictures(2)}, [torch.tensor([True, False])])
    green, red = (axes.patches[0].get_edgecolor() for axes in figure.axes)
    assert green[1] > green[0]
    assert red[0] > red[1]


class Recorder(SampleMetric):
    """Keeps what it was shown; its score is the mean brightness of the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.labels: list[Tensor] = []
        self.pixels: list[Tensor] = []

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        self.labels.append(labels)
        self.pixels.append(pixels)
        self.total += pixels.double().mean((1, 2, 3)).sum()
        self.count += len(pixels)

    def compute(self) -> dict[str, Tensor]:
        return {"brightness": self.total / self.count}


@pytest.fixture
def module() -> ELTModule:
    torch.manual_seed(0)
    network = LoopedMaskedTransformer(9, (2, 3), 4, num_layers=1, width=16, num_heads=2).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    sampler = partial(MaskGITSampler, steps=3)
    return ELTModule(network, MaskingProcess(9), MaskedObjective, ILSD(3), sampler, num_classes=4).eval()


def run(module: ELTModule, sweep: Sweep, loops: int, scale: float = 1.0) -> tuple[Row, Recorder]:
    metric = Recorder()
    sampler = module.sampler.with_settings(guidance=scale)
    return sweep.run(module, sampler, PixelTokenizer(9, (2, 3)), [metric], loops, classes_in_turn), metric


def classes_in_turn(index: Tensor) -> Request:
    return Request(index % 4, index)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_batch_size_changes_no_sample_and_every_loop_count_gets_the_same_labels(
    module: ELTModule, batch_size: int
) -> None:
    labels, index = torch.arange(23) % 4, torch.arange(23)
    for loops in (1, 5):
        row, metric = run(module, Sweep(23, batch_size, seed=6, num_pictures=7), loops)
        assert torch.equal(torch.cat(metric.labels), labels)
        codes = module.sample(labels, loops, sample_seeds(6, index))
        pixels = codes.view(-1, 1, 2, 3) / 8
        assert torch.equal(torch.cat(metric.pixels), pixels)
        assert row.metrics["brightness"] == pytest.approx([pixels.double().mean().item()])
        assert torch.equal(row.pictures, to_bytes(pixels[:7]))
        assert row.samples_per_second > 0


def test_repeats_use_the_next_seeds_and_show_the_first_pictures(module: ELTModule) -> None:
    row, _ = run(module, Sweep(20, 8, seed=6, repeats=3), 2)
    singles = [run(module, Sweep(20, 8, seed=seed), 2)[0] for seed in (6, 7, 8)]
    assert row.metrics["brightness"] == pytest.approx([single.metrics["brightness"][0] for single in singles])
    assert len(set(row.metrics["brightness"])) == 3
    assert torch.equal(row.pictures, singles[0].pictures)


def test_of_several_metrics_one_says_what_is_right_and_none_takes_anothers_name(module: ELTModule) -> None:
    class Likes(Recorder):
        def __init__(self, label: int) -> None:
            super().__init__()
            self.label = label

        def correct(self, pixels: Tensor, labels: Tensor) -> Tensor:
            return labels == self.label

        def compute(self) -> dict[str, Tensor]:
            return {f"likes {self.label}": torch.zeros(())}

    tokenizer, metrics = PixelTokenizer(9, (2, 3)), [Recorder(), Likes(1), Likes(0)]
    row = Sweep(6, 2, seed=1).run(module, module.sampler, tokenizer, metrics, 2, classes_in_turn)
    assert row.correct.tolist() == [False, True, False, False, False, True]
    with pytest.raises(UserError, match="two metrics call their score brightness"):
        Sweep(2, 2, seed=1).run(module, module.sampler, tokenizer, [Recorder(), Recorder()], 2, classes_in_turn)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_samples_of_one_process(module: ELTModule, world_size: int) -> None:
    _, whole = run(module, Sweep(23, 10, seed=1), 2)
    expected = torch.cat(whole.pixels)
    for rank in range(world_size):
        _, metric = run(module, Sweep(23, 4, seed=1, rank=rank, world_size=world_size), 2)
        assert torch.equal(torch.cat(metric.pixels), expected[rank::world_size])


def test_a_metric_on_another_device_is_given_its_samples_there(module: ELTModule) -> None:
    """Where the samples' device lacks float64, metrics stay on the CPU; here the metric pretends to be elsewhere."""

    class Elsewhere(Recorder):
        def update(self, pixels: Tensor, labels: Tensor) -> None:
            devices.append((pixels.device.type, labels.device.type))

        def compute(self) -> dict[str, Tensor]:
            return {"nothing": torch.zeros(())}

    devices: list[tuple[str, str]] = []
    metric = Elsewhere().to("meta")
    Sweep(5, 5, seed=0).run(module, module.sampler, PixelTokenizer(9, (2, 3)), [metric], 1, classes_in_turn)
    assert devices == [("meta", "meta")]


def test_costs_of_the_module_count_every_step_and_branch(module: ELTModule) -> None:
    network = module.network
    assert isinstance(network, LoopedMaskedTransformer)
    assert module.macs_per_sample(2) == 3 * network.macs(2)
    guided = module.sampler.with_settings(guidance=2.0)
    assert guided.guidance == Guidance(2.0)
    assert module.macs_per_sample(2, guided) == 6 * network.macs(2)
    assert module.macs_per_sample([1, 2, 4]) == sum(network.macs(loops) for loops in (1, 2, 4))
    backbone, total = module.num_parameters()
    assert backbone == sum(p.numel() for p in nn.ModuleList(network.backbone.layers).parameters())
    assert total == sum(p.numel() for p in network.parameters())

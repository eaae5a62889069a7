"""The commands end to end, on small real files, as a user runs them."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_runs import SMALL, SMALL_SQUARES, train_small_squares

from elt_lightning.cli import main, with_underscores
from elt_lightning.commands.settings import with_bases
from elt_lightning.commands.train import ELTCommandLine
from elt_lightning.errors import UserError

REPOSITORY = Path(__file__).parent.parent
QUICKSTART, DIGITS = REPOSITORY / "configs" / "quickstart.yaml", REPOSITORY / "configs" / "digits.yaml"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all: the cached data and the trained run are shared."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def work_at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture(scope="session")
def checkpoint(home: Path) -> Path:
    """A model trained for six steps on Latin squares."""
    return train_small_squares(QUICKSTART, home)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with status 2 and one line on stderr; give the line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("elt: error: ")]
        assert len(complaints) == 1
        return complaints[0]

    return run


def elt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elt_lightning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_of_fit_is_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made by Lightning's parser once, and then printed without importing torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["fit", "--help"]) == 0
    made = capsys.readouterr().out
    assert "--trainer.max_steps" in made
    assert "--ema.decay" in made
    code = (
        "import sys; from elt_lightning.cli import main; status = main(['fit', '-h']);"
        "sys.exit(status or 7 * ('torch' in sys.modules))"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout == made
    kept = tmp_path / "elt_lightning" / "fit_help.txt"
    kept.write_text("of an older version\nold")
    assert main(["fit", "--help"]) == 0
    assert capsys.readouterr().out == made
    assert kept.read_text().endswith(made)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_without_importing_torch_or_lightning(flag: str) -> None:
    code = (
        "import sys; from elt_lightning.cli import main; status = main(sys.argv[1:]);"
        "loaded = {'torch', 'lightning', 'jsonargparse'} & set(sys.modules); sys.exit(status or 7 * bool(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    if flag == "--help":
        assert all(f"  {name}" in done.stdout for name in ("fit", "validate", "test", "predict", "sample"))


def test_what_trains_nothing_does_not_wait_for_lightning() -> None:
    """It takes as long to import as the rest together; one process for all of them costs 4 s."""
    code = (
        "import contextlib, sys; from elt_lightning.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit): main([*command.split(), '--help'])\n"
        "    'lightning' in sys.modules and sys.exit(f'{command} imports Lightning')"
    )
    commands = "sample", "demo", "models", "compare", "encode images", "stats", "export", "push", "import", "loop"
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(commands)


def test_the_trained_run_holds_its_config_checkpoint_and_logs(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    assert "num_layers: 2" in (run / "config.yaml").read_text()
    assert list(run.glob("events.out.tfevents.*"))
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 6  # after the last validation, which was at step 4
    assert content["ema"]["updates"] == 6
    assert content["elt"]["model"]["network"]["init_args"]["input_shape"] == [5, 5]
    assert content["elt"]["tokenizer"]["sha256"]


def test_tensorboard_has_every_named_term_and_the_metrics_of_every_loop_count(checkpoint: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    settings = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    assert main(["fit", "--config", str(QUICKSTART), *SMALL_SQUARES, *settings, "--run_dir=runs/logged"]) == 0
    events = EventAccumulator("runs/logged")
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    terms = ("loss", "loss_teacher", "loss_student", "loss_distill", "lambda", "student_loops", "samples_per_second")
    assert {f"train/{term}" for term in terms} <= scalars
    names = ("loss", "valid_squares", "valid_lines", "fd_digits")
    assert {f"val/{name}@L{loops}" for name in names for loops in (1, 2, 3, 4)} <= scalars
    assert "val/samples" in events.Tags()["images"]
    assert [event.value for event in events.Scalars("train/lambda")] == pytest.approx([1, 2 / 3, 1 / 3])
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert 0 < rates[0] < rates[1] < rates[2]  # warm-up
    assert min(event.value for event in events.Scalars("train/gradient_norm")) > 0
    # One chart of all loop counts for each metric, and the settings beside the last scores.
    [charts] = events.Tensors("custom_scalars__config__")
    of_val = next(
        group for group in Layout.FromString(charts.tensor_proto.string_val[0]).category if group.title == "val"
    )
    for name in names:
        [tag] = next(chart for chart in of_val.chart if chart.title == name).multiline.tag
        assert {found for found in scalars if re.match(tag, found)} == {
            f"val/{name}@L{loops}" for loops in (1, 2, 3, 4)
        }
    assert {f"final/{name}@L4" for name in names} <= scalars
    settings_kept = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model/network/init_args/num_layers" in settings_kept


def test_sweep_writes_table_json_csv_and_pictures(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--loops", "1,2,6", "--guidance=1,2", "--num-samples", "10", "--repeats", "2"]
    assert main(["test", "--ckpt_path", str(checkpoint), *flags, "--run_dir=runs/sweep"]) == 0
    assert "guidance" in capsys.readouterr().out
    report = json.loads(Path("runs/sweep/loops.json").read_text())
    assert report["primary_metric"] == "valid_squares"
    assert report["higher_is_better"] is True
    assert (report["num_samples"], report["train_loops"], report["sampling_steps"]) == (10, 4, 3)
    assert (report["train_mode"], report["train_steps"]) == ("ilsd", 6)
    assert [(row["loops"], row["guidance"]) for row in report["rows"]] == [(k, g) for k in (1, 2, 6) for g in (1, 2)]
    first, second = report["rows"][:2]
    assert second["macs_per_sample"] == 2 * first["macs_per_sample"]
    assert set(first["metrics"]) == {"valid_squares", "valid_lines", "fd_digits"}
    assert first["metrics"]["fd_digits"]["std"] > 0
    with Path("runs/sweep/loops.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    events = EventAccumulator("runs/sweep").Reload()
    [shown] = events.Tensors("test/loops/text_summary")
    table = shown.tensor_proto.string_val[0].decode().splitlines()
    assert [row.strip("| ").split(" | ")[0] for row in table] == [
        "loops",
        "---|" * (len(lines[0]) - 1) + "---",
        *"112266",
    ]
    for picture in ("loops.png", "pareto.png"):
        assert Image.open(Path("runs/sweep") / picture).size[0] > 100


def test_sweep_does_not_depend_on_its_batch_size(checkpoint: Path) -> None:
    reports = []
    for size in (12, 5):
        folder = f"runs/batches_of_{size}"
        flags = ["--loops=2", "--num_samples=12", f"--loop_metrics.batch_size={size}", f"--run_dir={folder}"]
        assert main(["test", "--ckpt_path", str(checkpoint), *flags]) == 0
        reports.append(json.loads(Path(folder, "loops.json").read_text())["rows"][0]["metrics"])
    for name in reports[0]:
        assert reports[0][name]["mean"] == pytest.approx(reports[1][name]["mean"], rel=1e-6)


@pytest.mark.slow
def test_averaged_and_raw_weights_are_judged_apart(checkpoint: Path) -> None:
    scores = []
    for weights in ("ema", "raw"):
        flags = ["--loops=4", "--num_samples=12", f"--weights={weights}", f"--run_dir=runs/{weights}"]
        assert main(["test", "--ckpt_path", str(checkpoint), *flags]) == 0
        report = json.loads(Path(f"runs/{weights}/loops.json").read_text())
        assert report["weights"] == weights
        scores.append(report["rows"][0]["metrics"]["fd_digits"]["mean"])
    assert scores[0] != scores[1]


def test_validate_runs_from_a_checkpoint_alone(checkpoint: Path, refused: Callable[..., str]) -> None:
    flags = ["--loops=1,3", "--num_samples=5", "--run_dir=runs/validated"]
    assert main(["validate", "--ckpt-path", str(checkpoint), *flags]) == 0
    settings = yaml.safe_load(Path("runs/validated/config.yaml").read_text())["loop_metrics"]
    assert settings["num_validation_samples"] == 5  # num_samples are those of a test
    for flag in ("--guidance=2", "--repeats=2"):  # which validation does not sweep
        assert "there is no setting" in refused("validate", "--ckpt_path", str(checkpoint), flag)


def test_predict_writes_every_sample_once_in_order(checkpoint: Path) -> None:
    flags = ["--num_samples=11", "--samples.batch_size=4", "--loops=2", "--run_dir=runs/predicted"]
    assert main(["predict", "--ckpt_path", str(checkpoint), *flags]) == 0
    content = np.load("runs/predicted/samples.npz")
    assert content["arr_0"].shape == (11, 40, 40, 1)
    assert content["arr_0"].dtype == np.uint8
    assert content["labels"].tolist() == [i % 5 for i in range(11)]
    flags = ["--num_samples=3", "--samples.format=png", "--loops=2", "--run_dir=runs/pictures"]
    assert main(["predict", "--ckpt_path", str(checkpoint), *flags]) == 0
    paths = sorted(Path("runs/pictures/samples").glob("*.png"))
    assert [np.array(Image.open(path)).tolist() for path in paths] == content["arr_0"][:3, ..., 0].tolist()


def test_sample_draws_from_the_checkpoint_alone_and_overwrites_nothing(
    checkpoint: Path, refused: Callable[..., str]
) -> None:
    flags = ["--ckpt_path", str(checkpoint), "--classes=3,4", "--num=4", "--loops=1,2", "--output=grid.png"]
    assert main(["sample", *flags]) == 0
    first = np.array(Image.open("grid.png"))
    assert "exists" in refused("sample", *flags)
    assert main(["sample", *flags, "--overwrite"]) == 0
    assert np.array_equal(np.array(Image.open("grid.png")), first)
    assert main(["sample", *flags, "--overwrite", "--seed=1"]) == 0
    assert not np.array_equal(np.array(Image.open("grid.png")), first)


def test_sample_finds_a_tokenizer_that_moved_and_refuses_another(checkpoint: Path, refused: Callable[..., str]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    path = Path(content["elt"]["tokenizer"]["init_args"]["path"])
    path.rename("moved.safetensors")
    flags = ["--ckpt_path", str(checkpoint), "--num=1", "--output=moved.png"]
    try:
        assert "--tokenizer_path" in refused("sample", *flags)
        assert main(["sample", *flags, "--tokenizer_path=moved.safetensors"]) == 0
        other = "data/latin_squares/digit_network.safetensors"
        assert "sha256" in refused("sample", *flags, "--output=other.png", f"--tokenizer_path={other}")
    finally:
        Path("moved.safetensors").rename(path)


def test_flags_win_over_config_and_config_over_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The checkpoint was trained with 3 sampling steps."""
    config = tmp_path / "steps.yaml"
    config.write_text("model:\n  sampler:\n    class_path: elt_lightning.samplers.masked.MaskGITSampler\n")
    config.write_text(config.read_text() + "    init_args:\n      steps: 4\n")
    found = []
    layers: list[list[str]] = [[], ["--config", str(config)]]
    layers.append([*layers[1], "--model.sampler.init_args.steps=5"])
    for number, layer in enumerate(layers):
        folder = tmp_path / str(number)
        assert (
            main(
                ["test", *layer, "--ckpt_path", str(checkpoint), "--loops=1", "--num_samples=12", f"--run_dir={folder}"]
            )
            == 0
        )
        found.append(json.loads((folder / "loops.json").read_text())["sampling_steps"])
    assert found == [3, 4, 5]


def test_a_run_folder_is_never_used_twice(checkpoint: Path, refused: Callable[..., str]) -> None:
    message = refused("fit", "--config", str(QUICKSTART), "--run_dir=runs/small")
    assert "runs/small" in message
    for _ in range(2):
        assert main(["test", "--ckpt_path", str(checkpoint), "--loops=1", "--num_samples=12"]) == 0
    assert Path("runs/small/test_0/loops.json").is_file()
    assert Path("runs/small/test_1/loops.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["fitt"], "did you mean fit"),
        (["fit"], "required"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (["fit", "--config", str(DIGITS), "--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        (["fit", "--config", str(DIGITS), "--model.distillation.max_loop=3"], "max_loop"),
        (["fit", "--config", str(DIGITS), "--trainer.max_step=3"], "max_step"),
        (["fit", "--config", str(DIGITS), "--model.network.init_args.widht=3"], "widht"),
        (["fit", "--config", str(DIGITS), "--model.network=elt_lightning.networks.masked.Looped"], "Looped"),
        (["fit", "--config", str(DIGITS), "--model.distillation.min_loops=4"], "min_loops"),
        (["fit", "--config", str(DIGITS), "--model.distillation.mode=nothing"], "nothing"),
        (["fit", "--config", str(DIGITS), "--model.network.init_args.num_heads=5"], "num_heads"),
        (["fit", "--config", str(DIGITS), "--data.init_args.batch_size=0"], "batch"),
        (["fit", "--config", str(DIGITS), "--data.init_args.batch_size=99999"], "99999"),
        (["fit", "--config", str(DIGITS), "--trainer.max_steps=-1"], "max_steps"),
        (["fit", "--config", str(DIGITS), "--trainer.max_steps=many"], "many"),
        (["fit", "--config", str(DIGITS), "--ema.decay=1.5"], "decay"),
        (["test", "--config", str(DIGITS)], "--ckpt_path"),
        (["test", "--config", str(DIGITS), "--ckpt_path", str(DIGITS)], "not a readable checkpoint"),
        (["sample"], "--ckpt_path"),
        (["sample", "--ckpt_path", "missing.ckpt", "--output=none.png"], "missing.ckpt"),
    ],
)
def test_a_wrong_command_line_gives_one_clear_line(
    arguments: list[str], telling: str, refused: Callable[..., str]
) -> None:
    assert telling in refused(*arguments)


@pytest.mark.parametrize("value", ["0", "abc", "1,-2", ""])
def test_wrong_loop_counts_are_refused(value: str, checkpoint: Path, refused: Callable[..., str]) -> None:
    assert "loops" in refused("test", "--ckpt_path", str(checkpoint), f"--loops={value}")
    assert "loops" in refused("sample", "--ckpt_path", str(checkpoint), f"--loops={value}", "--output=none.png")


def test_debug_lets_an_error_through() -> None:
    """Without it the program ends in one line: see test_bad_input.py."""
    with pytest.raises(UserError, match=r"missing\.yaml"):
        main(["fit", "--config", "missing.yaml", "--debug"])


def test_a_checkpoint_of_another_shape_or_a_truncated_one_is_refused(
    checkpoint: Path, refused: Callable[..., str]
) -> None:
    wider = "--model.network.init_args.width=32"
    assert "shape" in refused("test", "--ckpt_path", str(checkpoint), wider)
    half = Path("half.ckpt")
    half.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    assert "not a readable checkpoint" in refused("sample", "--ckpt_path", str(half), "--output=none.png")


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights() -> None:
    """An epoch of digits is 22 batches, here in halves: the kill falls inside one, and training goes into the next."""
    settings = ["--config", str(DIGITS), *SMALL, "--data.init_args.batch_size=64"]
    settings += ["--data.init_args.micro_batch_size=32", "--model.network.init_args.dropout=0.1"]
    settings += ["--trainer.max_steps=40", "--trainer.val_check_interval=30", "--checkpoint.every_n_train_steps=4"]
    assert main(["fit", *settings, "--run_dir=runs/whole"]) == 0

    checkpoints = Path("runs/killed/checkpoints")
    command = [sys.executable, "-m", "elt_lightning", "fit", *settings, "--run_dir=runs/killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(checkpoints.glob("step_8.ckpt")):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"]
    assert 4 <= killed_at < 40
    last = str(checkpoints / "last.ckpt")
    assert main(["fit", *settings, "--run_dir=runs/killed", "--ckpt_path", last]) == 0

    whole, resumed = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    assert whole["global_step"] == resumed["global_step"] == 40
    assert_same(whole["state_dict"], resumed["state_dict"])
    assert_same(whole["ema"], resumed["ema"])
    assert_same(whole["optimizer_states"], resumed["optimizer_states"])
    assert_same(whole["lr_schedulers"], resumed["lr_schedulers"])


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one_does() -> None:
    settings = ["--config", str(DIGITS), *SMALL, "--data.init_args.batch_size=32", "--loop_metrics.num_samples=15"]
    settings += ["--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    assert main(["fit", *settings, "--run_dir=runs/one"]) == 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = elt("fit", *settings, *two, "--run_dir=runs/two")
    assert done.returncode == 0, done.stderr
    one_state, two_state = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")
    )
    for name in one_state:
        torch.testing.assert_close(two_state[name], one_state[name], rtol=1e-4, atol=1e-6)

    checkpoint = ["--ckpt_path=runs/one/checkpoints/last.ckpt", "--loops=2"]
    assert main(["test", *settings, *checkpoint, "--run_dir=runs/tested_by_one"]) == 0
    done = elt("test", *settings, *two, *checkpoint, "--run_dir=runs/tested_by_two")
    assert done.returncode == 0, done.stderr
    one_row, two_row = (
        json.loads(Path(f"runs/tested_by_{name}/loops.json").read_text())["rows"][0]["metrics"]
        for name in ("one", "two")
    )
    for name in one_row:
        assert two_row[name]["mean"] == pytest.approx(one_row[name]["mean"], rel=1e-5)


def assert_same(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.mark.parametrize(
    ("command", "setting"),
    [("fit", "micro_batch_size"), ("fit", "activation_checkpointing"), ("test", "loop_metrics.batch_size")],
)
def test_running_out_of_memory_names_what_to_change(
    command: str, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(arguments: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(ELTCommandLine, "for_arguments", run_out)
    assert main([command, "--config", str(DIGITS)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert setting in error
    assert "2.00 GiB" in error


def test_a_tilde_is_the_home_folder_in_configs_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell writes it out in words alone: in YAML and after an equals sign it would be the name of a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "low.yaml").write_text("data: {init_args: {training_files: [~/a.st, b~/c.st]}}\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\nrun_dir: ~/run\ndata: {init_args: {num_classes: 3}}\n")
    written = with_bases(["--config", str(tmp_path / "high.yaml")], tmp_path)
    low, high = (yaml.safe_load(Path(path).read_text()) for path in written[1::2])
    assert low == {"data": {"init_args": {"training_files": [f"{tmp_path}/a.st", "b~/c.st"]}}}
    assert high == {"run_dir": f"{tmp_path}/run", "data": {"init_args": {"num_classes": 3}}}
    assert with_underscores("--tokenizer-path=~/x.bin") == f"--tokenizer_path={tmp_path}/x.bin"

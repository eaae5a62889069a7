"""What the documentation says: links lead somewhere, commands parse, and the worked examples run."""

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import SMALL

from elt_lightning.cli import _MODULES, SUBCOMMANDS, main, with_underscores

ROOT = Path(__file__).parent.parent
OTHERS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "data/README.md",
    "benchmarks/README.md",
    "benchmarks/figures.md",
)
PAGES = sorted([*(ROOT / page for page in OTHERS), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as GitHub makes them, and of anchors in HTML."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*plain, *re.findall(r'id="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


MODULE_PATH = re.compile(
    r"`((?:elt_lightning/|configs/|experiments/|tests/|notebooks/|docs/)[\w./]+\.(?:py|yaml|md|ipynb|json))`"
)
DOTTED = re.compile(r"`(elt_lightning(?:\.\w+)+)`")
LINKED_SYMBOL = re.compile(r"\[`(\w+(?:\.\w+)*)`\]\((\.\./)?(elt_lightning/[\w/]+\.py)\)")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_symbols_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    missing = [path for path in MODULE_PATH.findall(text) if not (ROOT / path).exists()]
    for symbol, _, path in LINKED_SYMBOL.findall(text):
        found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for part in symbol.split("."):
            found = getattr(found, part, None)  # type: ignore[assignment]
        if found is None:
            missing.append(f"{symbol} of {path}")
    for dotted in DOTTED.findall(text):
        if not is_importable(dotted):
            missing.append(dotted)
    assert not missing


def is_importable(dotted: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    module, _, last = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        try:
            return hasattr(importlib.import_module(module), last)
        except ModuleNotFoundError:
            return False
    return True


def commands(page: Path) -> list[str]:
    """Every `elt …` command of a page, in blocks of shell, where lines may be continued, and within sentences."""
    text = page.read_text()
    blocks = [body for kind, body in FENCE.findall(text) if kind == "bash"]
    lines = [re.sub(r"^(\w+=\S+ )+", "", line.strip()) for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`(elt [^`]+)`", FENCE.sub("", text))]
    inline = [code for code in inline if not code.split()[-1].startswith("--")]  # a flag that is only mentioned
    return [line for line in (*lines, *inline) if line.startswith("elt ")]


PLACEHOLDER = {
    "C": "configs/quickstart.yaml",
    "CONFIG.yaml": "configs/quickstart.yaml",
    "FILE.yaml": "configs/quickstart.yaml",
}
ALL_COMMANDS = sorted(
    {line for page in PAGES if page.stem != "CHANGELOG" for line in commands(page)} - {"elt COMMAND --help"}
)


def test_the_pages_hold_commands_of_many_kinds() -> None:
    assert {"fit", "test", "sample", "encode", "plan", "export"} <= {line.split()[1] for line in ALL_COMMANDS}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the configs of the repository and the files of the worked examples, which can be imported."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for path, content in example_files().items():
        (tmp_path / path).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for path in example_files():
        sys.modules.pop(Path(path).stem, None)


def example_files() -> dict[str, str]:
    """The files of docs/extending.md: a block of Python or YAML goes by the last name of a file before it."""
    text = (ROOT / "docs" / "extending.md").read_text()
    files = {}
    for block in re.finditer(FENCE, text):
        if block[1] in ("python", "yaml"):
            ending = {"python": "py", "yaml": "yaml"}[block[1]]
            files[re.findall(rf"`(\w+\.{ending})`", text[: block.start()])[-1]] = block[2]
    return files


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_commands_parse(line: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to where something would be read or run: the parser takes every flag, and every setting of the config."""
    _, command, *arguments = [PLACEHOLDER.get(word, word) for word in shlex.split(line, comments=True)]
    assert command in SUBCOMMANDS
    arguments = [with_underscores(argument) for argument in arguments]
    if command in ("fit", "validate", "test", "predict"):
        parse_for_trainer(command, arguments, capsys)
    elif arguments:
        module = importlib.import_module(_MODULES[command])
        options, settings = module.build_parser().parse_known_args(arguments)
        assert vars(options)
        if command == "plan":
            parse_for_trainer("fit", settings, capsys)
        else:
            assert not settings


def parse_for_trainer(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Let `elt` print the config that these arguments come to; files that are not there are left out."""
    latents = any("shards" in argument for argument in arguments)
    for flag in ("--ckpt_path", "--init_from", "--plan"):
        while flag in arguments:
            place = arguments.index(flag)
            del arguments[place : place + 2]
            if flag == "--init_from":  # its settings come first
                arguments = ["--config", "configs/imagenet256/dit_16.yaml", *arguments]
    arguments = [argument for argument in arguments if not argument.startswith("--print_config")]
    if "--config" not in arguments:
        config = "configs/imagenet256/dit_16.yaml" if latents else "configs/quickstart.yaml"
        arguments = ["--config", config, *arguments]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([command, *arguments, "--print_config"]))
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    assert "model:" in captured.out


FEW_STEPS = [*SMALL, "--trainer.max_steps=3", "--trainer.val_check_interval=3"]


@pytest.mark.slow
def test_the_examples_of_extending_run(
    workplace: Path, latin_squares_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each example's own commands, with fewer steps and samples."""
    assert set(example_files()) == {
        "focal_objective.py",
        "focal.yaml",
        "shifted_rows.py",
        "shifted_rows.yaml",
        "row_metric.py",
        "full_rows.yaml",
    }
    shutil.copytree(latin_squares_root, workplace / "data" / "latin_squares")
    ran = [line for line in commands(ROOT / "docs" / "extending.md") if "--run_dir" in line or "--ckpt_path" in line]
    assert [line.split()[1] for line in ran] == ["fit", "test", "fit", "test", "test"]
    for line in ran:
        flags = FEW_STEPS if line.split()[1] == "fit" else SMALL
        if "focal" in line:
            flags = [*flags, "--data.init_args.num_train=64", "--data.init_args.num_val=40"]
        assert main([*shlex.split(line)[1:], *flags]) == 0, capsys.readouterr().err

    focal = json.loads(Path("runs/focal/test_0/loops.json").read_text())
    assert focal["primary_metric"] == "valid_squares"
    assert "focus: 2.0" in Path("runs/focal/config.yaml").read_text()
    plain, with_metric = (json.loads(Path(f"runs/shifted_rows/test_{i}/loops.json").read_text()) for i in range(2))
    assert set(plain["rows"][0]["metrics"]) == {"loss"}
    assert set(with_metric["rows"][0]["metrics"]) == {"loss", "full_rows"}
    assert 0 <= with_metric["rows"][0]["metrics"]["full_rows"]["mean"] <= 1


def test_the_examples_compute_what_they_say(workplace: Path) -> None:
    """Focus 0 is cross-entropy; the data have the rows that the metric counts."""
    import torch

    from elt_lightning.objectives.masked import MaskedObjective
    from elt_lightning.processes.masking import MaskingProcess

    focal = importlib.import_module("focal_objective").FocalMaskedObjective
    plain, x, seeds = MaskedObjective(MaskingProcess(7), label_smoothing=0.0), torch.randint(7, (5, 9)), torch.arange(5)
    logits = torch.randn(5, 9, 7)
    corrupted = plain.corrupt(x, seeds, step=0)
    torch.testing.assert_close(
        focal(MaskingProcess(7), focus=0.0).ground_truth(logits, corrupted), plain.ground_truth(logits, corrupted)
    )
    assert (focal(MaskingProcess(7)).ground_truth(logits, corrupted) < plain.ground_truth(logits, corrupted)).all()

    data = importlib.import_module("shifted_rows").ShiftedRowsDataModule(num_train=50)
    metric = importlib.import_module("row_metric").FullRows()
    batch = data.training_set()[torch.arange(50)]
    metric.update(data.tokenizer.decode(batch.x), batch.labels)
    assert metric.compute()["full_rows"] == 1
    grid = batch.x.view(-1, 5, 5)
    for row in range(4):
        shifted = torch.stack([line.roll(int(step)) for line, step in zip(grid[:, row], batch.labels + 1, strict=True)])
        assert torch.equal(grid[:, row + 1], shifted)
    broken = batch.x.clone()
    broken[:, 0] = broken[:, 1]
    metric.reset()
    metric.update(data.tokenizer.decode(broken), batch.labels)
    assert metric.compute()["full_rows"] == pytest.approx(0.8)


def tables_in(page: Path) -> list[list[dict[str, str]]]:
    """Return a page's tables, each row as {heading: cell}."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        headings, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        tables.append([dict(zip(headings, row, strict=True)) for row in rows])
    return tables


def test_tables_of_the_experiments_are_those_of_the_results() -> None:
    """Each row is one of an ablation, to the letter, but that it may leave out larger loop counts."""
    results = [row for path in (ROOT / "docs" / "results").glob("*/ablation.md") for row in tables_in(path)]
    pages = [ROOT / "docs" / "experiments.md", ROOT / "docs" / "upcycling.md"]
    copied = [table for page in pages for table in tables_in(page) if "backbone parameters" in table[0]]
    assert len(copied) == 6
    for table in copied:
        metric = next(iter(table[0]))
        rows = [{**row, metric: re.sub(r" \([\d.]+ ± [\d.]+ at L = 8\)$", "", row[metric])} for row in table]
        assert any(
            all(any(row.items() <= measured.items() for measured in result) for row in rows) for result in results
        )


QUICKSTARTS = ("quickstart", "quickstart_diffusion", "quickstart_video")
MEASURED_COLUMNS = {
    "loops": "loops",
    "layers passed through": "effective_depth",
    "parameters of the looped stack": "params_backbone",
    "samples per second": "samples_per_second",
    "10⁹ multiply–accumulates per sample": "macs_per_sample",
}


def test_tables_of_the_quickstarts_are_those_of_the_results() -> None:
    pages = (ROOT / "README.md", ROOT / "docs" / "experiments.md")
    copied = [table for page in pages for table in tables_in(page) if "layers passed through" in table[0]]
    for name, table in zip(QUICKSTARTS, copied, strict=True):
        report = json.loads((ROOT / "docs" / "results" / name / "loops.json").read_text())
        for row, measured in zip(table, report["rows"], strict=True):
            for heading, cell in row.items():
                column = MEASURED_COLUMNS.get(heading)
                value = measured[column] if column else measured["metrics"][heading.replace(" ", "_")]["mean"]
                value *= 1e-9 if column == "macs_per_sample" else 100 if cell.endswith(" %") else 1
                digits = len(cell.removesuffix(" %").partition(".")[2])
                printed = float(cell.removesuffix(" %").replace(",", ""))
                assert printed == pytest.approx(value, abs=0.501 * 10**-digits), (name, heading)


def test_tensors_of_ones_own_train_with_the_config_of_the_page(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import save_file

    text = (ROOT / "docs" / "data.md").read_text()
    (config,) = (body for kind, body in FENCE.findall(text) if kind == "yaml")
    Path("tensors.yaml").write_text(config)
    for name in ("train", "val"):
        save_file({"x": torch.rand(80, 1, 8, 8) * 2 - 1, "labels": torch.arange(80) % 10}, f"{name}.safetensors")
    flags = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--loop_metrics.num_validation_samples=4"]
    assert main(["fit", "--config", "tensors.yaml", *flags, "--run_dir=runs/tensors"]) == 0, capsys.readouterr().err
    assert Path("runs/tensors/checkpoints/last.ckpt").exists()

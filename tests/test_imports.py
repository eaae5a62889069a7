"""The house: which room may import which, read from the imports themselves. Costs no import of the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "elt_lightning"

LOW = "data data.toy metrics model networks objectives processes samplers tokenizers training checkpoints evaluation"
ARROWS = {
    "processes": "",
    "networks": "processes",
    "objectives": "processes",
    "samplers": "onnx_runner processes",
    "model": "networks objectives processes samplers",
    "training": "model networks objectives processes samplers",
    "tokenizers": "processes training",  # of training what TAKEN_FROM_TRAINING lists
    "metrics": "tokenizers training",
    "data": "data.toy metrics processes tokenizers",
    "data.toy": "data metrics processes tokenizers",
    "checkpoints": "model networks onnx_runner processes training",
    "evaluation": "checkpoints data metrics model processes samplers tokenizers training",
    "bench": LOW,
    "commands": f"bench {LOW}",
    "reproduce": f"bench cli commands {LOW}",
    "cli": "",  # it finds the commands by name, when they are called
    "onnx_runner": "",
    "files": "",
    "errors": "",
    "signals": "",
}
"""What each room may import besides itself, `files`, `errors`, `signals` and the package's own face."""

TAKEN_FROM_TRAINING = {
    "tokenizers": "optimiser runs skip_non_finite_steps weights",  # of vq_training.py; checks of files
    "metrics": "meter weights",
}
"""The files of `training` that rooms below it may import: they import none of them."""

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:2] == ["data", "toy"] else 1])


def imports(path: Path) -> Iterator[str]:
    """List the package's modules that a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            candidates = [name, name.rpartition(".")[0]]
            yield from (c for c in candidates if (PACKAGE.parent / f"{c.replace('.', '/')}.py").is_file())


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_what_lies_below_it_alone(room: str) -> None:
    allowed = {room, "files", "errors", "signals", *ARROWS[room].split()}
    wrong = [
        f"{module_of(path)} -> {name}"
        for path in FILES
        if room_of(module_of(path)) == room
        for name in imports(path)
        if room_of(name) not in allowed
    ]
    assert not wrong


def test_every_file_lies_in_a_room_and_no_files_import_each_other_in_a_circle() -> None:
    graph = {module_of(path): set(imports(path)) for path in FILES}
    assert {room_of(module) for module in graph} == set(ARROWS)
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("room", TAKEN_FROM_TRAINING)
def test_rooms_below_training_take_a_few_files_of_it_alone(room: str) -> None:
    taken = {name for path in (PACKAGE / room).glob("*.py") for name in imports(path)}
    allowed = {f"elt_lightning.training.{name}" for name in TAKEN_FROM_TRAINING[room].split()}
    assert {name for name in taken if room_of(name) == "training"} == allowed

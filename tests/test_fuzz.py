"""Random damage to shards, indices, checkpoints and configs: it is read all the same, or refused in one line."""

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_files import write_shards
from test_bad_input import INDEX, SECONDS, TOKENS, at_most

from elt_lightning.checkpoints.pretrained import build_module, read_pretrained
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.cli import main
from elt_lightning.commands import export
from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.streams import HeldOutStream
from elt_lightning.errors import UserError

pytestmark = pytest.mark.slow

# The same examples in every run: what fails once fails again, and a run that passed passes.
fuzzed = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
slowly_fuzzed = settings(fuzzed, max_examples=15)
Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a config of a model on them, a checkpoint of it, and its export."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_shards(folder / "tokens", INDEX)
    (folder / "good.yaml").write_text(TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config=good.yaml", "--trainer.max_steps=1", "--run_dir=run"]) == 0
        export.run("export", ["--ckpt_path=run/checkpoints/last.ckpt", "--output=exported"])
    return folder


@pytest.fixture(autouse=True)
def _in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def overwritten(place: float, new: bytes) -> Damage:
    return lambda content: content[: int(place * len(content))] + new + content[int(place * len(content)) + len(new) :]


def cut(place: float) -> Damage:
    return lambda content: content[: int(place * len(content))]


def left_out(place: float, length: int) -> Damage:
    return lambda content: content[: int(place * len(content))] + content[int(place * len(content)) + length :]


PLACES = st.floats(0, 1, exclude_max=True)
DAMAGES = st.one_of(
    st.builds(overwritten, PLACES, st.binary(min_size=1, max_size=600)),
    st.builds(overwritten, PLACES, st.binary(min_size=1, max_size=2)),
    st.builds(overwritten, st.sampled_from([block / 20 for block in range(20)]), st.just(bytes(512))),
    st.builds(cut, PLACES),
    st.builds(left_out, PLACES, st.integers(1, 1024)),
)


def survives(read: Callable[[], object]) -> None:
    """Read something damaged: it must work, or be refused."""
    with at_most(SECONDS), suppress(UserError):
        read()


def damage(path: Path, damages: list[Damage]) -> None:
    content = path.read_bytes()
    for spoil in damages:
        content = spoil(content)
    path.write_bytes(content)


@fuzzed
@given(st.lists(DAMAGES, min_size=1, max_size=3))
def test_shards(tmp_path: Path, damages: list[Damage]) -> None:
    shutil.copytree("tokens", tmp_path / "shards", dirs_exist_ok=True)
    damage(tmp_path / "shards" / "00000.tar", damages)
    stream = HeldOutStream(str(tmp_path / "shards"), INDEX, batch_size=4)

    def read() -> None:
        for batch in stream.batches(0):
            assert (batch.x >= 0).all()
            assert (batch.x < 300).all()
            assert (batch.labels >= 0).all()
            assert (batch.labels < 3).all()

    survives(read)


@fuzzed
@given(st.lists(DAMAGES, min_size=1, max_size=3))
def test_bytes_of_indices(tmp_path: Path, damages: list[Damage]) -> None:
    shutil.copytree("tokens", tmp_path / "shards", dirs_exist_ok=True)
    damage(tmp_path / "shards" / "index.json", damages)
    survives(lambda: ShardIndex.read(str(tmp_path / "shards")))


@fuzzed
@given(st.lists(DAMAGES, min_size=1, max_size=2))
def test_bytes_of_checkpoints(tmp_path: Path, damages: list[Damage]) -> None:
    shutil.copy("run/checkpoints/last.ckpt", tmp_path / "bad.ckpt")
    damage(tmp_path / "bad.ckpt", damages)
    survives(lambda: build_module(read_checkpoint(tmp_path / "bad.ckpt")))


@fuzzed
@given(st.sampled_from(["config.json", "model.safetensors"]), st.lists(DAMAGES, min_size=1, max_size=2))
def test_bytes_of_exported_models(tmp_path: Path, name: str, damages: list[Damage]) -> None:
    shutil.copytree("exported", tmp_path / "exported", dirs_exist_ok=True)
    damage(tmp_path / "exported" / name, damages)
    survives(lambda: build_module(read_pretrained(tmp_path / "exported")))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from(
        [0.5, -1.0, float("nan"), float("inf"), "", "word", "torch.nn.Linear", "os.system", [], {}, [1], {"a": 1}]
    ),
)


def paths_of(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested settings."""
    below = tree.items() if isinstance(tree, dict) else ()
    return [path for key, value in below for path in [(*above, key), *paths_of(value, (*above, key))]]


def changed(tree: dict[str, Any], path: tuple[Any, ...], value: Any, how: str) -> dict[str, Any]:
    """Nested settings with one of them replaced, removed or misspelt."""
    tree = copy.deepcopy(tree)
    section = tree
    for key in path[:-1]:
        section = section[key]
    if how == "replaced":
        section[path[-1]] = value
    else:
        old = section.pop(path[-1])
        if how == "misspelt":
            section[f"{path[-1]}s"] = old
    return tree


CONFIG = yaml.safe_load(TOKENS)


@slowly_fuzzed
@given(st.sampled_from(paths_of(CONFIG)), VALUES, st.sampled_from(["replaced"] * 3 + ["removed", "misspelt"]))
def test_configs(tmp_path: Path, path: tuple[Any, ...], value: Any, how: str) -> None:
    """Through the command itself; a single step, so that what is fine is done soon."""
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changed(CONFIG, path, value, how)))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with at_most(SECONDS):
        flags = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}"]
        assert main(["fit", f"--config={tmp_path / 'bad.yaml'}", *flags]) in (0, 2)


@fuzzed
@given(st.data())
def test_settings_of_indices(tmp_path: Path, data: st.DataObject) -> None:
    shutil.copytree("tokens", tmp_path / "shards", dirs_exist_ok=True)
    where = tmp_path / "shards" / "index.json"
    content = json.loads(Path("tokens/index.json").read_text())
    path = data.draw(st.sampled_from(paths_of(content)))
    where.write_text(json.dumps(changed(content, path, data.draw(VALUES), "replaced")))

    def read() -> None:
        index = ShardIndex.read(str(tmp_path / "shards"))
        list(HeldOutStream(str(tmp_path / "shards"), index, batch_size=4).batches(0))

    survives(read)

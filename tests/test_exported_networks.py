"""Networks as other programs run them: ONNX graphs and one `torch.export` program against torch, loops free."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from elt_lightning.checkpoints.graphs import PROGRAM, write_onnx, write_program
from elt_lightning.cli import main
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.onnx_runner import OnnxNetwork
from elt_lightning.processes.conditioning import Condition

CODES = 11
SIZES: dict[str, Any] = {"num_classes": 3, "num_layers": 2, "width": 16, "num_heads": 2}
AROUND = {"prelude_layers": 1, "coda_layers": 1}
OF_CLIPS: dict[str, Any] = {"input_shape": (3, 2, 8, 8), "patch_size": (1, 2, 2), "block": "film", **SIZES}
NETWORKS: dict[str, Any] = {
    "masked": lambda: LoopedMaskedTransformer(CODES, (4, 4), **SIZES),
    "masked_recall": lambda: LoopedMaskedTransformer(CODES, (4, 4), **SIZES, **AROUND, recall=True),
    "diffusion": lambda: LoopedDiT((3, 8, 8), **SIZES, **AROUND),
    "clips_recall": lambda: LoopedDiT(**OF_CLIPS, positions="learned", recall=True),
}
PASSES = ((1, ()), (4, (2,)), (12, (1, 5, 12)))


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> LoopedNetwork:
    torch.manual_seed(0)
    network: LoopedNetwork = NETWORKS[request.param]().eval()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    return network


def codes_of(network: LoopedNetwork) -> int | None:
    return CODES if isinstance(network, LoopedMaskedTransformer) else None


def arguments(network: LoopedNetwork, batch: int) -> tuple[Tensor, Condition]:
    labels = torch.randint(SIZES["num_classes"] + 1, (batch,))
    if codes_of(network):
        return torch.randint(CODES + 1, (batch, *network.sample_shape)), Condition(labels)
    return torch.randn(batch, *network.sample_shape), Condition(labels, torch.rand(batch))


@pytest.mark.slow
@torch.no_grad()
def test_what_was_exported_predicts_as_torch_does(network: LoopedNetwork, tmp_path: Path) -> None:
    """At loop counts that the export has not seen, every exit and state, from nothing and from a carried state."""
    weights = tmp_path / "model.safetensors"
    save_file({f"network.{name}": tensor.clone() for name, tensor in network.state_dict().items()}, weights)
    assert write_onnx(network, tmp_path, weights, codes_of(network)) < 1e-4
    assert write_program(network, tmp_path / PROGRAM, codes_of(network), {}) < 1e-6
    graphs, program = OnnxNetwork(tmp_path), torch.export.load(tmp_path / PROGRAM).module()
    assert graphs.has_recall == network.has_recall
    for batch in (1, 5):
        x, condition = arguments(network, batch)
        state = None
        for loops, exits in PASSES:
            wanted, ended = network(x, condition, loops, exits, state)
            found, ended_graphs = graphs(x, condition, loops, exits, state)
            assert found.keys() == wanted.keys()
            inputs = {"x": x, "labels": condition.labels, "loops": torch.tensor(loops)}
            inputs |= {"exits": torch.tensor(sorted(wanted))}
            inputs |= {} if condition.time is None else {"time": condition.time}
            if network.has_recall:
                inputs["state"] = torch.zeros_like(ended) if state is None else state
            found_program, ended_program = program(**inputs)
            for place, count in enumerate(sorted(wanted)):
                torch.testing.assert_close(torch.from_numpy(found[count]), wanted[count], rtol=0, atol=1e-4)
                torch.testing.assert_close(found_program[place], wanted[count], rtol=0, atol=1e-6)
            torch.testing.assert_close(torch.from_numpy(ended_graphs), ended, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(ended_program, ended, rtol=0, atol=1e-6)
            state = ended if network.has_recall else None
    if network.has_recall:
        with pytest.raises(ValueError, match="the state is of 1 samples, and there are 5"):
            graphs(x, condition, 1, state=ended[:1])
    with pytest.raises(RuntimeError, match="exits must lie in"):
        program(**inputs | {"exits": torch.tensor([1, 13])})


@pytest.mark.slow
def test_the_page_about_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and every piece of Python of docs/export.md, with the runner that was written."""
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "exported" / "squares")
    ran = []
    for language, text in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "bash":
            assert main(shlex.split(text)[1:]) == 0
        else:
            importlib.invalidate_caches()  # the folder was not there when it was put on the path
            exec(text, names := {})
            ran.append(names)
    onnx, sampled, torchs = ran
    assert sampled["tokens"].equal(sampled["model"].sample(sampled["labels"], 4, sampled["seeds"]))
    for place, loops in enumerate((1, 2, 8)):
        torch.testing.assert_close(torchs["predictions"][place], torch.from_numpy(onnx["predictions"][loops]))


def test_the_runner_needs_neither_torch_nor_this_package() -> None:
    """Nothing but numpy, and onnxruntime when a folder is opened: a copy of the file is all that one has to have."""
    runner = Path(__file__).parent.parent / "elt_lightning" / "onnx_runner.py"
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); "
        "print(sorted({'torch', 'lightning', 'elt_lightning'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, runner], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""Networks written for other programs: as three ONNX graphs, or as one program of `torch.export`.

In both the loop count is free at every call, and no file grows with it.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from elt_lightning import onnx_runner
from elt_lightning.checkpoints.store import CONFIG
from elt_lightning.errors import UserError
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.parts import Program, parts_of
from elt_lightning.onnx_runner import GRAPHS, OnnxNetwork
from elt_lightning.processes.conditioning import Condition

RUNNER = Path(onnx_runner.__file__)
PROGRAM = "model.pt2"
ONNX_FILES = (*(f"{name}.onnx" for name in GRAPHS), RUNNER.name)

CLOSE = 1e-3
"""How far a prediction may be from torch's, as a share of the largest one."""

LOOPS, EXITS = 5, (1, 2)
"""The pass by which what was written is compared with torch."""

BATCH = 3
"""Samples that a network is traced with, where 1 would be taken for a constant; it is then compared with 1."""


def check_onnx() -> None:
    """Check that what ONNX graphs are written and run with is installed (UserError: it is not)."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--format onnx needs {error.name}: pip install 'elt-lightning[onnx]'") from error


def example_inputs(network: LoopedNetwork, codebook_size: int | None) -> dict[str, Tensor]:
    """Return what a network can be called with, by the names that its exported forms have for it.

    Args:
        network: on the CPU.
        codebook_size: V, of a network of tokens; None for one of noisy latents.
    """
    random, shape = np.random.default_rng(0), (BATCH, *network.sample_shape)
    dtype = next(network.parameters()).dtype
    inputs = {"x": torch.from_numpy(random.integers(0, (codebook_size or 0) + 1, shape))}
    if codebook_size is None:
        inputs["x"] = torch.from_numpy(random.standard_normal(shape)).to(dtype)
    inputs["labels"] = torch.zeros(BATCH, dtype=torch.int64)
    if codebook_size is None:
        inputs["time"] = torch.tensor(random.random(BATCH), dtype=torch.float32)
    if network.has_recall:
        with torch.no_grad():
            h, _ = network.embed(inputs["x"], _condition(inputs))
        inputs["state"] = torch.from_numpy(random.standard_normal(h.shape)).to(dtype)
    return inputs


def write_onnx(network: LoopedNetwork, folder: Path, weights: Path, codebook_size: int | None) -> float:
    """Write the three graphs and their runner.

    The weights stay where they are: the graphs say where in the safetensors file each lies, once for all of them.

    Args:
        network: in eval mode, in float32 on the CPU.
        folder: to write into.
        weights: the file in it that holds the network's weights, whose names begin with ``network.``
        codebook_size: V, of a network of tokens; None for one of noisy latents.

    Returns:
        how far the graphs' predictions are from torch's, at most.

    Raises:
        UserError: a layer cannot be written as ONNX, or the graphs predict something else.
    """
    inputs = example_inputs(network, codebook_size)
    parts = parts_of(network, tuple(inputs.values()))
    arguments, fewer = (parts.arguments(tuple(x[:rows] for x in inputs.values())) for rows in (BATCH, BATCH - 1))
    of_loop, of_exit = ([f"{n}_{i}" for i in range(len(a) - 1)] for n, a in zip(GRAPHS[1:], arguments[1:], strict=True))
    named = (
        (list(inputs), ["h", *of_loop, *of_exit]),
        (["h", *of_loop], ["next_h"]),
        (["h", *of_exit], ["prediction", "next_state"]),
    )
    for name, part, tensors, of_fewer, (takes, makes) in zip(GRAPHS, parts, arguments, fewer, named, strict=True):
        with _quietly(f"the network's {name} cannot be written as ONNX"):
            program = torch.onnx.export(
                part.eval(),
                tensors,
                input_names=takes,
                output_names=makes,
                dynamic_shapes=(tuple(_of_batch(*both) for both in zip(tensors, of_fewer, strict=True)),),
                dynamo=True,
                optimize=False,  # the runtime does that; here it would copy weights
                verbose=False,
            )
        _write_graph(program.model, folder / f"{name}.onnx", weights)  # type: ignore[union-attr]
    shutil.copyfile(RUNNER, folder / RUNNER.name)
    one = {name: value[:1] for name, value in inputs.items()}
    predictions, state = OnnxNetwork(folder)(one["x"], _condition(one), LOOPS, EXITS, one.get("state"))
    return _checked(network, one, [*(predictions[r] for r in sorted(predictions)), state])


def write_program(network: LoopedNetwork, path: Path, codebook_size: int | None, description: dict[str, Any]) -> float:
    """Write :class:`~elt_lightning.networks.parts.Program` of a network as a file for ``torch.export.load``.

    Args:
        network: in eval mode on the CPU.
        path: of the file.
        codebook_size: V, of a network of tokens; None for one of noisy latents.
        description: what the file says of itself: ``config.json``, one of its extra files.

    Returns:
        how far the program's predictions are from torch's, at most.

    Raises:
        UserError: a layer cannot be exported, or the program predicts something else.
    """
    inputs = example_inputs(network, codebook_size)
    loops = {"loops": torch.tensor(LOOPS), "exits": torch.tensor([*EXITS, LOOPS])}
    shapes: dict[str, Any] = {name: {0: Dim("batch")} for name in inputs}
    shapes |= {"loops": None, "exits": {0: Dim("exits")}}
    with _quietly("the network cannot be exported"):
        program = torch.export.export(Program(network).eval(), (), inputs | loops, dynamic_shapes=shapes)
    for part in program.graph_module.modules():
        for node in part.graph.nodes:
            node.meta.pop("stack_trace", None)  # longer than the program, and full of this machine's paths
    torch.export.save(program, path, extra_files={CONFIG: json.dumps(description)})
    one = {name: value[:1] for name, value in inputs.items()}
    with torch.no_grad():
        predictions, state = torch.export.load(path).module()(**one, **loops)
    return _checked(network, one, [*predictions, state])


def _condition(inputs: dict[str, Tensor]) -> Condition:
    return Condition(inputs["labels"], inputs.get("time"))


def _of_batch(tensor: Tensor, of_fewer: Tensor) -> dict[int, Dim]:
    """Return which axes are as long as the batch, given the same tensor for a smaller batch."""
    both = zip(tensor.shape, of_fewer.shape, strict=True)
    return {axis: Dim("batch") for axis, (size, fewer) in enumerate(both) if size != fewer}


def _checked(network: LoopedNetwork, inputs: dict[str, Tensor], found: Sequence[Any]) -> float:
    """Return how far the predictions at EXITS and LOOPS, and the state, are at most from the network's own.

    Raises:
        UserError: they are something else.
    """
    with torch.no_grad():
        predictions, state = network(inputs["x"], _condition(inputs), LOOPS, EXITS, inputs.get("state"))
    wanted = [*(predictions[r] for r in sorted(predictions)), state]
    largest = max(float(tensor.abs().max()) for tensor in wanted)
    apart = max(float((torch.as_tensor(f) - w).abs().max()) for f, w in zip(found, wanted, strict=True))
    if not apart <= CLOSE * max(largest, 1):
        raise UserError(
            f"what was exported predicts something else than the model: {apart:.2g} off, where it predicts up to "
            f"{largest:.2g}"
        )
    return apart


def _write_graph(model: Any, path: Path, weights: Path) -> None:
    """Write a graph whose weights, where the safetensors file has them, are named by their places in it."""
    import onnx_ir

    places = _places(weights)
    for name, value in model.graph.initializers.items():
        if name in places:
            begin, end = places[name]
            value.const_value = onnx_ir.ExternalTensor(
                weights.name, begin, end - begin, value.dtype, shape=value.shape, name=name, base_dir=weights.parent
            )
    for node in model.graph:
        node.metadata_props.clear()  # traces of the calls that led to it, longer than the graph
    onnx_ir.save(model, path)


def _places(weights: Path) -> dict[str, tuple[int, int]]:
    """Return where in a safetensors file each tensor's bytes begin and end."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in offsets.items()}


@contextmanager
def _quietly(message: str) -> Iterator[None]:
    """Export without gradients and without what torch says of itself; what fails is one line that begins with this.

    Raises:
        UserError: the work failed, as it may on layers of one's own.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise anything on what they do not know
        cause = error.__cause__ or error
        raise UserError(f"{message}: {str(cause).strip().partition(chr(10))[0]}") from error
    finally:
        logger.setLevel(level)

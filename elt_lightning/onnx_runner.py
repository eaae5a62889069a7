"""Run a network that `elt export --format onnx` wrote, any number of loops: needs numpy and onnxruntime alone.

A copy of this file lies beside the graphs, so that they can be used where this package is not installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GRAPHS = ("embedding", "loop", "exit")
"""The graphs of a folder: what happens once, one loop, one exit. What two of them name alike is handed on."""


class Condition(NamedTuple):
    """What a batch is conditioned on."""

    labels: Any  # (B,) whole numbers, the null class last
    time: Any = None  # (B,) in [0, 1] for diffusion, None for masked generation


class OnnxNetwork:
    """A looped network in onnxruntime, whose loop count, exits and carried state are free at every call.

    Args:
        folder: with ``embedding.onnx``, ``loop.onnx``, ``exit.onnx``, and the file with their weights.
        providers: of onnxruntime, such as ``["CUDAExecutionProvider"]``.
        threads: for one operation; None leaves the choice to onnxruntime.

    Attributes:
        has_recall: whether the loop may begin from a carried state.
    """

    def __init__(
        self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int | None = None
    ) -> None:
        import onnxruntime  # here, so that a lack of it is met by those alone who run graphs

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self._graphs = {
            name: onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options, providers=list(providers))
            for name in GRAPHS
        }
        self._inputs = {name: {i.name: i for i in graph.get_inputs()} for name, graph in self._graphs.items()}
        self.has_recall = "state" in self._inputs["embedding"]

    def __call__(
        self, x: Any, condition: Any, loops: int, exits: Sequence[int] = (), state: Any = None
    ) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Predict at each exit of one pass.

        Args:
            x: (B, T) tokens or (B, C, …) noisy latents.
            condition: anything with ``labels`` and ``time``, such as :class:`Condition`.
            loops: L ≥ 1.
            exits: further loop counts in [1, loops].
            state: (B, T, D) to begin the loop from, which an earlier pass returned; None to begin anew.

        Returns:
            {r: prediction} for every exit and for ``loops``: logits (B, T, V), or what a network of noisy latents
            predicts, (B, C, …); and the state (B, T, D) of the loop at its end. All are float32.

        Raises:
            ValueError: loops or exits out of range, a state for a network without recall or of another number of
                samples, or diffusion without a time.
        """
        wanted = {*exits, loops}
        if min(wanted) < 1 or max(wanted) > loops:
            raise ValueError(
                f"loops must be at least 1 and exits lie in [1, loops]: loops {loops}, exits {tuple(exits)}"
            )
        if state is not None and not self.has_recall:
            raise ValueError("the network has no recall: its loop cannot begin from another pass's state")
        takes = self._inputs["embedding"]
        if state is not None and len(state) != len(x):
            raise ValueError(f"the state is of {len(state)} samples, and there are {len(x)}")
        if ("time" in takes) != (condition.time is not None):
            raise ValueError("condition.time is what a network of noisy latents needs, and no other one takes")
        if state is None and self.has_recall:
            state = np.zeros((len(x), *takes["state"].shape[1:]), np.float32)
        values = {"x": x, "labels": condition.labels, "time": condition.time, "state": state}
        values = self._run("embedding", values)
        predictions = {}
        for loop in range(1, loops + 1):
            values["h"] = self._run("loop", values)["next_h"]
            if loop in wanted:
                left = self._run("exit", values)
                predictions[loop] = left["prediction"]
        return predictions, left["next_state"]

    def _run(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Run a graph on the values of its inputs' names; return its outputs by theirs."""
        graph = self._graphs[name]
        inputs = {key: np.asarray(values[key], _TYPES[i.type]) for key, i in self._inputs[name].items()}
        return dict(zip((o.name for o in graph.get_outputs()), graph.run(None, inputs), strict=True))


_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}

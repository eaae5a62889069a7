"""Published weights of DiT and SiT as models of this project: their settings, and their tensors under our names."""

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.serialization import safe_globals

from elt_lightning.errors import UserError
from elt_lightning.files import is_file
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.embeddings import sine_positions, sinusoids
from elt_lightning.networks.scales import SCALES
from elt_lightning.training.weights import differences

Kind = Literal["dit", "sit"]

_OURS = {
    "x_embedder.proj": "embedding",
    "t_embedder.mlp.0": "condition.time_in",
    "t_embedder.mlp.2": "condition.time_out",
    "y_embedder.embedding_table": "condition.classes",
    "blocks.*.attn.qkv": "backbone.layers.*.attention.query_key_value",
    "blocks.*.attn.proj": "backbone.layers.*.attention.output",
    "blocks.*.mlp.fc1": "backbone.layers.*.mlp_in",
    "blocks.*.mlp.fc2": "backbone.layers.*.mlp_out",
    "blocks.*.adaLN_modulation.1": "backbone.layers.*.modulate",
    "final_layer.linear": "head.linear",
    "final_layer.adaLN_modulation.1": "head.modulate",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def read_dit(
    path: Path, kind: Kind, num_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """Read weights of facebookresearch/DiT or willisma/SiT.

    Args:
        path: of a state dict, or of a checkpoint of their training, whose averaged weights are taken if it has any.
        kind: whose they are: both have the same names.
        num_heads: attention heads, which the weights do not tell; by default those of the published width.

    Returns:
        the ``model`` section that describes the model with its process, its objective and a sampler of their code; its
        state dict; and what of a checkpoint was taken, "ema" or "model", None of a mere state dict.

    Raises:
        UserError: there is no such file, or it holds something else: one line says what.
    """
    content = _load(path)
    _check_flags(path, kind, content.get("args"))
    weights = unwrapped(content)
    try:
        settings = _network_settings(weights, num_heads)
        with torch.device("meta"):
            network = LoopedDiT(**settings)
    except ValueError as error:
        raise UserError(f"{path} is not of the layout of DiT and SiT: {error}") from error
    expected = {theirs: tensor for name, tensor in network.state_dict().items() if (theirs := renamed(name, _THEIRS))}
    patches = (settings["input_shape"][0], *network.patch)
    expected["x_embedder.proj.weight"] = expected["x_embedder.proj.weight"].unflatten(1, patches)
    expected["pos_embed"] = sine_positions(network.grid, network.width)[None]
    if faults := differences(expected, weights):
        raise UserError(f"{path} is not of the layout of DiT and SiT (tensors: {faults})")
    found = weights["pos_embed"]
    # In a file of half precision the table is rounded too.
    if not (found.float() - expected["pos_embed"]).abs().max() < max(1e-4, torch.finfo(found.dtype).eps):
        raise UserError(f"{path}: pos_embed is not the table of sines that DiT and SiT compute")
    state = from_dit_state_dict(weights)
    if kind == "sit":
        settings, state = _with_sit_conventions(settings, state)
    return _model_section(kind, settings), {f"network.{name}": w for name, w in state.items()}, _part(content)


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights in a file: the averaged ones, ``ema``, of a training checkpoint; names without prefixes.

    They may begin as those of wrapped modules do, with ``module.`` or ``_orig_mod.``.
    """
    part = _part(state)
    return {
        re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value
        for name, value in (state[part] if part else state).items()
    }


def _part(state: Mapping[str, Any]) -> str | None:
    return next((part for part in ("ema", "model") if isinstance(state.get(part), Mapping)), None)


def from_dit_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of a facebookresearch/DiT checkpoint for a :class:`LoopedDiT` of as many layers.

    The patch convolution becomes a linear layer; the output's rows, there ordered (row, column, channel), are put in
    the order (channel, row, column) that patches have here; the fixed positions, which are computed, are left out.

    Args:
        state: the weights, or a checkpoint; see :func:`unwrapped`.

    Raises:
        ValueError: a name that no DiT has, or no weights where DiT's patches are embedded.
    """
    state = unwrapped(state)
    if "x_embedder.proj.weight" not in state:
        raise ValueError(f"x_embedder.proj.weight of facebookresearch/DiT is missing: here is {', '.join(state)[:200]}")
    patch = state["x_embedder.proj.weight"].shape[2:]
    ours = {}
    for name, value in state.items():
        if name == "pos_embed":
            continue
        if name == "x_embedder.proj.weight":
            value = value.flatten(1)
        elif name.startswith("final_layer.linear."):
            value = value.unflatten(0, (math.prod(patch), -1)).transpose(0, 1).flatten(0, 1)
        new = renamed(name, _OURS)
        if new is None:
            raise ValueError(f"{name} is not a weight of facebookresearch/DiT")
        ours[new] = value
    return ours


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Return a weight's name in the other layout, None where that has none."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"(blocks|backbone\.layers)\.(\d+)\.(.+)", stem)
    new = table.get(f"{block[1]}.*.{block[3]}" if block else stem)
    return new and f"{new.replace('*', block[2]) if block else new}.{kind}"


def _load(path: Path) -> Mapping[str, Any]:
    if not is_file(path):
        raise UserError(f"there is no file {path}")
    try:
        with safe_globals([argparse.Namespace]):  # the flags of a training, in its checkpoints
            # The checkpoint of a training is four times its average: what is not used is not read. Files of the format
            # before torch 1.6 cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises anything on damaged bytes
        raise UserError(f"{path} is not a readable file of weights: it is damaged or of another kind") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not named weights")
    return state


def _check_flags(path: Path, kind: Kind, flags: Any) -> None:
    """Refuse a file whose flags or name say that it is of another kind, or path, than is known here.

    The weights do not: those of both have the same names and shapes.
    """
    said = vars(flags) if isinstance(flags, argparse.Namespace) else {}
    model = str(said.get("model", path.name))
    if model.startswith(("DiT", "SiT")) and not model.lower().startswith(kind):
        raise UserError(f"{path} is of a {model}, by its flags or name: elt import {model[:3].lower()} reads it")
    for name, known in (("path_type", "Linear"), ("prediction", "velocity")):
        if said.get(name, known) != known:
            raise UserError(f"{path} was trained with {name} {said[name]}: of SiT's, {known} alone is known here")


_DIMENSIONS = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
"""Of the tensors whose shapes are a model's settings."""


def _network_settings(weights: Mapping[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    for name, dimensions in _DIMENSIONS.items():
        shape = getattr(weights.get(name), "shape", ())
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"it has no tensor {name!r} of {dimensions} dimensions")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    side = math.isqrt(weights["pos_embed"].shape[1])
    if num_heads is None:
        heads = {scale.width: scale.num_heads for name, scale in SCALES.items() if name in ("S", "B", "L", "XL")}
        if width not in heads:
            raise ValueError(
                f"the published models are {', '.join(map(str, heads))} wide, not {width}: say --num_heads"
            )
        num_heads = heads[width]
    blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "input_shape": [channels, side * patch, side * patch],
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "num_layers": len(blocks),
        "patch_size": patch,
        "width": width,
        "num_heads": num_heads,
        "mlp_width": len(weights["blocks.0.mlp.fc1.weight"]),
        "out_channels": len(weights["final_layer.linear.weight"]) // patch**2,
    }


def _with_sit_conventions(
    settings: dict[str, Any], state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn SiT's time, 0 for noise, and velocity, data less noise, into ours, and cut off outputs that SiT ignores.

    cos(ω·(1 − t)) and sin(ω·(1 − t)) are linear in cos(ω·t) and sin(ω·t), so that the layer behind them takes it in.
    """
    channels = settings["input_shape"][0]
    rows = channels * settings["patch_size"] ** 2  # ordered (channel, row, column): the first are the velocity's
    weight = state["condition.time_in.weight"].double()
    of_cosine, of_sine = weight.chunk(2, dim=1)
    sine, cosine = sinusoids(torch.ones((), dtype=torch.float64), weight.shape[1] // 2)
    rotated = torch.cat([of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine], dim=1)
    changed = {"condition.time_in.weight": rotated.float()}
    changed |= {f"head.linear.{kind}": -state[f"head.linear.{kind}"][:rows] for kind in ("weight", "bias")}
    return settings | {"out_channels": channels, "time_scale": 1.0}, state | changed


def _model_section(kind: Kind, network: dict[str, Any]) -> dict[str, Any]:
    """Describe the model: their noise; the sampler of DiT's script that computes FID, Euler's method for SiT."""
    learns_variance = network["out_channels"] > network["input_shape"][0]
    sampler = {"steps": 250, "guidance": {"scale": 1.5, "channels": 3}}
    if kind == "dit":
        process = {"prediction": "epsilon", "schedule": _described("processes.gaussian.LinearBetas")}
        objective = _described("objectives.ddpm.DDPMObjective")
        γ = "learned" if learns_variance else 1.0  # without one, DiT's code takes β for the variance
        sampler = _described("samplers.diffusion.DDPMSampler", **sampler, variance_interpolation=γ)
    else:
        # The path's margins, which SiT's has none of, lie below what float32 can tell.
        schedule = _described("processes.gaussian.StraightPath", limit=40.0)
        process = {"prediction": "velocity", "schedule": schedule}
        objective = _described("objectives.flow_matching.FlowMatchingObjective")
        sampler = _described("samplers.diffusion.DDIMSampler", **sampler)
    return {
        "network": _described("networks.diffusion.LoopedDiT", **network),
        "process": _described("processes.gaussian.GaussianProcess", **process),
        "objective": objective,
        "distillation": {"max_loops": 1, "mode": "vanilla"},
        "sampler": sampler,
        "num_classes": network["num_classes"],
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}},
        "class_dropout_prob": 0.1,
    }


def _described(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"elt_lightning.{name}", "init_args": settings}

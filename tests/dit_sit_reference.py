"""How dit_sit_reference.json was made: the code of DiT and SiT, run on weights and noise that every machine can make.

python tests/dit_sit_reference.py DIT SIT writes it anew, given clones of facebookresearch/DiT and willisma/SiT, of
which the file names the commits, and the package torchdiffeq. Of timm, which needs torchvision, the three classes that
both import are below.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elt_lightning.processes.noise import Stream, normal, sample_seeds

VALUES = Path(__file__).with_suffix(".json")
SHAPE, WIDTH, DEPTH, HEADS, CLASSES, PATCH = (4, 4, 4), 32, 3, 4, 10, 2
STEPS, SCALE = 25, 1.5
LABELS = torch.tensor([3, 7])
SEEDS = sample_seeds(5, torch.arange(2))
WATCHED = (slice(None), slice(None), 1, 2)
"""Of every state of a trajectory: one value of each channel of both samples."""


def random_dit_state(out_channels: int) -> dict[str, Tensor]:
    """Make a state dict of DiT without its table of positions; SiT's has the same names."""
    shapes = {
        "x_embedder.proj": (WIDTH, SHAPE[0], PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH**2 * out_channels, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
    named = {"y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH)}
    for stem, shape in shapes.items():
        named |= {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
    seeds = sample_seeds(11, torch.arange(len(named)))
    return {
        name: normal(seeds[i : i + 1], 0, Stream.NOISE, shape)[0] * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        for i, (name, shape) in enumerate(named.items())
    }


def training_case() -> tuple[Tensor, Tensor, Tensor]:
    """Return clean latents (B, 4, 4, 4), noise of the same shape, and steps (B,) of a training step, 0 among them."""
    seeds = sample_seeds(13, torch.arange(4))
    clean, noise = (normal(seeds, step, Stream.NOISE, SHAPE) for step in (0, 1))
    return clean, noise, torch.tensor([0, 1, 400, 999])


def make(dit: Path, sit: Path) -> dict[str, Any]:
    """Run their code."""
    stand_in_for_timm()
    torch.set_grad_enabled(False)
    start = normal(SEEDS, 0, Stream.INITIAL_NOISE, SHAPE).repeat(2, 1, 1, 1)
    settings = {"y": torch.cat([LABELS, torch.full_like(LABELS, CLASSES)]), "cfg_scale": SCALE}
    sizes = {"input_size": SHAPE[1], "hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES}

    sys.path.insert(0, str(dit))
    import diffusion as dit_diffusion
    from models import DiT

    model = DiT(**sizes).eval()
    model.load_state_dict(random_dit_state(2 * SHAPE[0]) | {"pos_embed": model.pos_embed})
    noises = iter([normal(SEEDS, step, Stream.SAMPLER_NOISE, SHAPE).repeat(2, 1, 1, 1) for step in range(STEPS)])
    dit_diffusion.gaussian_diffusion.th.randn_like = lambda _: next(noises)
    respaced = dit_diffusion.create_diffusion(str(STEPS))
    steps = respaced.p_sample_loop_progressive(
        model.forward_with_cfg, start.shape, start, clip_denoised=False, model_kwargs=settings, device="cpu"
    )
    values = {"dit": laid_out([state["sample"] for state in steps])}
    clean, noise, t = training_case()
    whole = dit_diffusion.create_diffusion(timestep_respacing="")
    terms = whole.training_losses(model, clean, t, {"y": LABELS.repeat(2)}, noise)
    values["dit_training"] = {name: terms[name].tolist() for name in ("mse", "vb")}

    sys.path[0] = str(sit)
    del sys.modules["models"]
    from models import SiT
    from transport import Sampler, create_transport

    model = SiT(**sizes, learn_sigma=True).eval()
    model.load_state_dict(random_dit_state(2 * SHAPE[0]) | {"pos_embed": model.pos_embed})
    euler = Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=STEPS + 1)
    values["sit"] = laid_out(list(euler(start, model.forward_with_cfg, **settings))[1:])
    commits = {
        path.name: subprocess.check_output(["git", "-C", path, "rev-parse", "--short", "HEAD"], text=True).strip()
        for path in (dit, sit)
    }
    return {"commits": commits} | values


def laid_out(states: list[Tensor]) -> dict[str, Any]:
    """Keep a value of each channel after every step, and the samples at the end."""
    states = [state[: len(LABELS)] for state in states]
    return {"steps": [state[WATCHED].flatten().tolist() for state in states], "samples": states[-1].flatten().tolist()}


def stand_in_for_timm() -> None:
    """Put in the place of timm.models.vision_transformer what DiT and SiT take from it."""

    class PatchEmbed(nn.Module):
        def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool) -> None:
            super().__init__()
            self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
            self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).flatten(2).mT

    class Attention(nn.Module):
        def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
            super().__init__()
            self.heads, self.qkv, self.proj = num_heads, nn.Linear(width, 3 * width, qkv_bias), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    class Mlp(nn.Sequential):
        def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
            super().__init__()
            self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
            self.fc2 = nn.Linear(hidden_features, in_features)

    names = ["timm", "timm.models", "timm.models.vision_transformer"]
    sys.modules |= {name: ModuleType(name) for name in names}
    vars(sys.modules[names[-1]]).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)


if __name__ == "__main__":
    made = make(*map(Path, sys.argv[1:3]))
    VALUES.write_text(json.dumps(made) + "\n")

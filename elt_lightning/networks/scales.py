"""The named sizes of the paper (section 4.1) and of DiT: width, MLP width, heads, depth of the unlooped baseline."""

from dataclasses import dataclass

import torch

from elt_lightning.errors import check_memory


@dataclass(frozen=True)
class Scale:
    """Shape of one transformer layer, and how many of them the unlooped baseline stacks.

    The MLP widths and head counts of B, H and G are inferred from the usual factor of four and 64 to 96 units per
    head. S, B, L and XL are also DiT's. ``wide`` is inferred from the parameter counts of the paper's Table 2
    (diffusion), which it explains with FiLM blocks and a condition of width 1024; its head count is a guess.
    """

    width: int
    mlp_width: int
    num_heads: int
    full_depth: int


SCALES: dict[str, Scale] = {
    "S": Scale(width=384, mlp_width=1536, num_heads=6, full_depth=12),
    "B": Scale(width=768, mlp_width=3072, num_heads=12, full_depth=12),
    "L": Scale(width=1024, mlp_width=4096, num_heads=16, full_depth=24),
    "XL": Scale(width=1152, mlp_width=4608, num_heads=16, full_depth=28),
    "H": Scale(width=1280, mlp_width=5120, num_heads=16, full_depth=32),
    "G": Scale(width=1536, mlp_width=6144, num_heads=16, full_depth=48),
    "wide": Scale(width=2048, mlp_width=8192, num_heads=16, full_depth=32),
}


def layer_shape(
    scale: str | None, width: int | None, num_heads: int | None, mlp_width: int | None
) -> tuple[int, int, int]:
    """Return (width, num_heads, mlp_width) of a named scale, from explicit numbers, or from a scale with some replaced.

    Raises:
        ValueError: the scale is unknown, or neither a scale nor width and num_heads were given, a number is below 1, or
            num_heads does not divide width.
    """
    check_sizes(1, width=width, num_heads=num_heads, mlp_width=mlp_width)
    if scale is not None:
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(SCALES)}")
        named = SCALES[scale]
        mlp_width = mlp_width or (named.mlp_width if width is None else None)
        width, num_heads = width or named.width, num_heads or named.num_heads
    if width is None or num_heads is None:
        raise ValueError("give either scale, or width and num_heads")
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
    return width, num_heads, mlp_width or 4 * width


def check_sizes(smallest: int, **sizes: int | None) -> None:
    """Check that the settings of these names, where they are given, are not below the smallest allowed.

    Raises:
        ValueError: one is.
    """
    for name, size in sizes.items():
        if size is not None and size < smallest:
            raise ValueError(f"{name} must be at least {smallest}, not {size}")


MOST_BYTES = 2**50
"""Bytes of weights: a pebibyte, beyond any machine."""

MOST_LAYERS = 100_000
"""As Python objects, so many take gigabytes and minutes before the first of them runs."""


def check_possible(num_layers: int, width: int, mlp_width: int) -> None:
    """Check that the layers can exist, before one of them is built: by their matrices in float32.

    Where tensors are made without contents, on the ``meta`` device, only what no machine has is refused.

    Raises:
        ValueError: no machine has the memory.
        UserError: this machine does not.
    """
    weights = num_layers * (4 * width**2 + 2 * width * mlp_width)
    what = f"num_layers {num_layers}, width {width} and mlp_width {mlp_width}"
    if 4 * weights > MOST_BYTES or num_layers > MOST_LAYERS:
        raise ValueError(
            f"no machine has the memory for {what}: at most "
            f"{MOST_LAYERS} layers and {MOST_BYTES / 1e12:.0f} TB of weights, not {4 * weights / 1e12:.2g} TB"
        )
    if torch.get_default_device().type != "meta":
        check_memory(f"a network of {what}", 4 * weights)

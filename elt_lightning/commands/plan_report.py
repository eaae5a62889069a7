"""What `elt plan` prints: sections of tables, with the arithmetic of each number."""

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from elt_lightning.commands.plan_data import Data
from elt_lightning.planning import BACKWARD, FLOPS_PER_MAC, Plan, Precision, Settings


def show(plan: Plan, data: Data, console: Console) -> None:
    """Print a plan, with the arithmetic that leads to each figure."""
    sections = {
        "Data": data_section(data),
        "Parameters": parameter_section(plan),
        "Multiply–accumulates (MAC) of one sample": macs_section(plan),
        "Steps": steps_section(plan),
        "Memory of one device in training": memory_section(plan),
        "Disk": disk_section(plan, data),
        "GPU-hours of training": training_section(plan),
        "GPU-hours of elt test": sweep_section(plan),
    }
    for title, parts in sections.items():
        console.print(f"\n{title}", style="bold", highlight=False)
        for part in parts:
            part = Text(part) if isinstance(part, str) else part  # a path may look like rich's markup
            console.print(Padding(part, (0, 0, 0, 2), expand=False), highlight=False)


def data_section(data: Data) -> list[RenderableType]:
    """Say what the data are, and whether they were asked."""
    module = data.module
    shape = "×".join(map(str, module.input_shape))
    what = f"latents {shape}" if module.num_codes is None else f"{shape} tokens of {module.num_codes:,} codes"
    count = "an unknown number of" if data.num_samples is None else f"{data.num_samples:,}"
    held_out = f", {data.num_held_out:,} held out" if data.num_held_out else ""
    line = f"{count} training samples{held_out}; {module.num_classes:,} classes; {what}"
    if data.assumed is None:
        return [line]
    name, _, reason = data.assumed.partition(", because ")
    return [f"assumed, as {name}: {line}", f"because {reason}"]


def parameter_section(plan: Plan) -> list[RenderableType]:
    """Count the parameters."""
    backbone, network = scaled(plan.parameters_backbone), scaled(plan.parameters)
    return [aligned(("shared backbone", backbone), ("whole network", network))]


def macs_section(plan: Plan) -> list[RenderableType]:
    """Say what a pass, a sample and a training image cost."""
    table = with_columns("loops", "one pass", "drawing a sample")
    for loops, macs in plan.forward_macs.items():
        table.add_row(str(loops), scaled(macs), scaled(plan.sample_macs[loops]))
    return [
        table,
        f"drawing takes {plan.passes_per_sample:,} passes: {plan.sampling_steps:,} steps, guidance "
        f"{plan.guidance_scale:g}",
        f"a training image takes {scaled(plan.image_macs.total)}, as worked out below",
    ]


def steps_section(plan: Plan) -> list[RenderableType]:
    """Say how many optimiser steps there are, and how one is shared out."""
    settings = plan.settings
    passes = settings.batch_size // settings.devices // settings.micro_batch_size
    return [
        f"{settings.steps_said} = {settings.steps:,} optimiser steps",
        f"samples of a step: {settings.batch_size:,} = {settings.devices:,} × {passes:,} × "
        f"{settings.micro_batch_size:,} (devices × passes of each × samples of a pass)",
    ]


def memory_section(plan: Plan) -> list[RenderableType]:
    """Lay out what a device holds, with and without ``checkpoint_loops``."""
    settings, kept = plan.settings, plan.activations
    autocast = Precision.named(settings.precision).autocast
    copies = f"weights copied to {str(autocast).removeprefix('torch.')} by autocast"
    samples = f"{settings.micro_batch_size:,} samples ×"
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "gradient_buckets": "gradients again, to exchange them between devices (DDP)",
        "optimizer_state": "the optimiser's state",
        "average": "averaged weights, which lie on the same device",
        "weight_copies": copies if autocast else "what does not grow with the samples",
        "loops": f"activations of a loop: {samples} {bytes_of(kept.loop.per_sample)}, {plan.max_loops} or 1 held",
        "states": f"states between loops: {samples} {bytes_of(kept.states.per_sample)}",
        "ends": f"embedding, heads, losses: {samples} {bytes_of(kept.ends.per_sample)}",
    }
    here = {recompute: " (this config)" * (recompute == plan.checkpoint_loops) for recompute in plan.memory}
    table = with_columns("", f"all kept{here[False]}", f"checkpoint_loops{here[True]}")
    for name, meaning in names.items():
        amounts = [getattr(memory, name) for memory in plan.memory.values()]
        if any(amounts):
            table.add_row(meaning, *(bytes_of(amount) for amount in amounts))
    table.add_row("total", *(bytes_of(memory.total) for memory in plan.memory.values()), style="bold")
    return [
        table,
        "Activations are what autograd keeps when this network and loss run on tensors without contents. On top come",
        "what an operation needs for a moment, the CUDA context, gaps between allocations: see train/peak_memory_gib.",
    ]


def disk_section(plan: Plan, data: Data) -> list[RenderableType]:
    """Say what encoded sets and checkpoints take."""
    disk = data.disk()
    names = {
        "training_codes": "codes of the training pictures alone",
        "training_shards": "in shards of elt encode",
        "training_shards_mirrored": "in shards with --mirrored",
        "held_out_shards": "shards of the held-out pictures",
    }
    rows = [(names[name], scaled(amount, "B")) for name, amount in disk.items()]
    rows.append(("a checkpoint: weights, optimiser's state, averaged weights", scaled(plan.checkpoint_bytes, "B")))
    kept = plan.settings.num_checkpoints
    total = scaled((kept + 1) * plan.checkpoint_bytes, "B")
    return [aligned(*rows, (f"checkpoints: {kept:,} kept, and room to write the next", total))]


def training_section(plan: Plan) -> list[RenderableType]:
    """Work out the hours of training, line by line."""
    settings, image = plan.settings, plan.image_macs
    hours = plan.training.gpu_hours(settings.flops_per_second)
    forward = image.forward + image.students
    rows = [
        (f"one pass, L = {plan.max_loops}", scaled(image.forward, "MAC")),
        ("+ heads of students", scaled(image.students, "MAC")),
        ("× 3, as backward takes twice forward", scaled((1 + BACKWARD) * forward, "MAC")),
        ("+ loops computed again, where checkpoint_loops is set", scaled(image.recomputed, "MAC")),
        ("× 2 operations in a MAC: one image", scaled(FLOPS_PER_MAC * image.total, "FLOP")),
        (
            f"× {plan.training.count:,} images = {settings.steps:,} steps × {settings.batch_size:,}",
            scaled(plan.training.flops, "FLOP"),
        ),
        (f"/ {speed(settings)}", in_hours(hours)),
    ]
    if settings.devices > 1:
        rows.append((f"/ {settings.devices:,} devices", in_hours(hours / settings.devices, "hours on the clock")))
    if plan.validation.count:
        held_out = f" and {settings.num_held_out:,} held-out losses" if settings.num_held_out else ""
        work = f"{settings.num_validation_samples:,} samples{held_out} at each loop count"
        rows.append(
            (
                f"beside it, validation: {plan.validation.count:,} times {work}",
                in_hours(plan.validation.gpu_hours(settings.flops_per_second)),
            )
        )
    return [
        aligned(*rows),
        "Peak and utilisation are assumptions, by default 0.4 of the 989 TFLOP/s of an H100 or H200 in dense bfloat16:",
        "replace them by your own measurement with --tflops and --utilisation. "
        f"This config computes in {settings.precision or '32-true'}.",
    ]


def sweep_section(plan: Plan) -> list[RenderableType]:
    """Work out the hours of a sweep over loop counts."""
    settings = plan.settings
    table = with_columns("loops", "one sample", f"× {settings.num_test_samples:,}", f"/ {speed(settings)}")
    for loops, work in plan.test.items():
        hours = work.gpu_hours(settings.flops_per_second)
        table.add_row(
            str(loops), scaled(FLOPS_PER_MAC * work.macs, "FLOP"), scaled(work.flops, "FLOP"), in_hours(hours)
        )
    hours = sum(work.gpu_hours(settings.flops_per_second) for work in plan.test.values())
    table.add_row("all", "", "", in_hours(hours), style="bold")
    scales = f" A sample stands for one at each guidance scale of {settings.guidance}." if settings.guidance else ""
    return [table, f"Without the tokenizer's decoder and the metrics' networks, the same at every loop count.{scales}"]


def speed(settings: Settings) -> str:
    """Write out the speed that is reckoned with."""
    return f"({settings.tflops:g} TFLOP/s × {settings.utilisation:g})"


def aligned(*rows: tuple[str, str]) -> Table:
    """Lay out names and their amounts."""
    table = Table.grid(padding=(0, 3))
    table.add_column()
    table.add_column(justify="right")
    for name, amount in rows:
        table.add_row(name, amount)
    return table


def with_columns(first: str, *others: str) -> Table:
    """Begin a table whose columns after the first hold amounts."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def scaled(amount: float, unit: str = "") -> str:
    """Write an amount with three digits and a decimal prefix: 26.9 GMAC."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    while abs(amount) >= 999.5 and len(prefixes) > 1:
        amount, prefixes = amount / 1000, prefixes[1:]
    digits = f"{amount:#.3g}".rstrip(".") if amount else "0"
    return f"{digits} {prefixes[0]}{unit}".rstrip()


def in_hours(amount: float, unit: str = "GPU-hours") -> str:
    """Write hours with three digits."""
    return f"{amount:,.0f} {unit}" if amount >= 99.5 else f"{amount:#.3g} {unit}"


def bytes_of(amount: int) -> str:
    """Write bytes of memory in the unit that suits them, as devices' memory is counted."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if amount >= size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount:,} B" if amount else "–"

"""Loss and metric curves of a finished run, as JSON and a picture to compare one's own run with.

python -m elt_lightning.reproduce.curves RUN --output docs/results/curves/NAME
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elt_lightning.cli import status_of
from elt_lightning.errors import UserError
from elt_lightning.evaluation.pictures import write_figure
from elt_lightning.files import write_json

Curves = dict[str, list[tuple[int, float]]]
"""{logged name: (optimiser step, value) in order of steps}."""


def main() -> None:
    """Read a run's TensorBoard files, and write ``<output>.json`` and ``<output>.png``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    options = parser.parse_args()
    curves = read_curves(options.run)
    write_json(options.output.with_suffix(".json"), curves, indent=None)
    write_figure(options.output.with_suffix(".png"), draw(curves, options.output.name))
    print(options.output.with_suffix(".png"))


def read_curves(run: Path) -> Curves:
    """Read what was logged of losses and metrics, to four digits (UserError: there is nothing in the folder)."""
    events = EventAccumulator(str(run))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("train/loss", "val/"))]
    if not names:
        raise UserError(f"{run} holds no TensorBoard files of a training")
    return {
        name: [(event.step, float(f"{event.value:.4g}")) for event in events.Scalars(name)] for name in sorted(names)
    }


def draw(curves: Curves, title: str) -> Figure:
    """Draw training losses, held-out losses and metrics, each kind in its own panel."""
    kinds = {
        "training loss": [name for name in curves if name.startswith("train/")],
        "held-out loss": [name for name in curves if name.startswith("val/loss")],
    }
    metrics = sorted({name.split("@")[0] for name in curves if name.startswith("val/") and "val/loss" not in name})
    kinds |= {metric: [name for name in curves if name.startswith(f"{metric}@")] for metric in metrics}
    kinds = {kind: names for kind, names in kinds.items() if names}
    figure = Figure(figsize=(4.2 * len(kinds), 3.4), dpi=100)
    for axes, (kind, names) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        for name in names:
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, values, marker="o" if len(steps) < 20 else None, markersize=3, label=name.split("/")[1])
        axes.set_title(kind.removeprefix("val/"))
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(status_of(main, "curves"))

"""What loggers show beside single scalars: the loops of a metric in one chart, learning rate, settings with scores."""

import re
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from elt_lightning.files import markdown_table


class Charts(Callback):
    """Log the learning rate; draw the loop counts of each metric into one chart; put settings beside the scores.

    TensorBoard shows the charts under *Custom scalars*, and a run's settings with the scores of its last validation,
    ``final/<metric>@L<loops>``, under *HParams*, where runs are compared. Other loggers get the settings when training
    begins.

    Args:
        settings: the resolved ``model``, ``data`` and ``trainer`` sections, as plain data.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._drawn: set[str] = set()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell loggers the settings; TensorBoard's are written with the scores."""
        for target in trainer.loggers:
            if not isinstance(target, TensorBoardLogger):
                target.log_hyperparams(self.settings)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the learning rate of the step."""
        pl_module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out a chart for each metric that is measured at several loop counts, when there is a new one."""
        names = {name.partition("@L")[0] for name in trainer.callback_metrics if re.search(r"@L\d+$", name)}
        if names > self._drawn:
            self._drawn = names
            for target in tensorboards(trainer):
                target.experiment.add_custom_scalars(layout(sorted(names)))

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings beside the scores of the last validation, if there was one."""
        scores = {
            name.replace("val/", "final/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        for target in tensorboards(trainer) if scores else ():
            target.log_hyperparams(self.settings, scores)


def layout(names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's layout with one chart of all loop counts for each metric: {group: {metric: tags}}."""
    groups: dict[str, dict[str, list[Any]]] = {}
    for name in names:
        group, _, metric = name.rpartition("/")
        groups.setdefault(group, {})[metric] = ["Multiline", [rf"^{re.escape(name)}@L\d+$"]]
    return groups


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """List those of a trainer's loggers that write TensorBoard's events."""
    return [target for target in trainer.loggers if isinstance(target, TensorBoardLogger)]


def log_table(trainer: Trainer, name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show a table in every logger that takes one: in TensorBoard as text."""
    for target in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(target, TensorBoardLogger):
            target.experiment.add_text(name, markdown_table(headings, rows), trainer.global_step)
        elif isinstance(target, WandbLogger):
            target.log_table(name, list(headings), [list(row) for row in rows], step=trainer.global_step)

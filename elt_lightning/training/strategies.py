"""How a run is spread over devices: which strategies there are, and the one for sharded weights."""

from itertools import chain
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from elt_lightning.errors import UserError
from elt_lightning.training.sharded_checkpoints import read_folder, write_folder
from elt_lightning.training.sharding import as_sharded
from elt_lightning.training.weights import META


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints that any number of devices and every strategy can go on from.

    Lightning 2.6.6 numbers the optimiser's states of a checkpoint otherwise than the optimiser does, which has kernels
    first, and so assigns the states of one weight to another when an ordinary checkpoint is resumed.

    Args:
        data_parallel_size: copies of the model; by default one on each node.
        tensor_parallel_size: devices that share a copy; by default those of a node. Their product is the number of
            devices, and each of them trains on its own samples.
        save_distributed_checkpoint: write folders, each device its own part; otherwise files, gathered on the first
            device. See :mod:`elt_lightning.training.sharded_checkpoints`.
        settings: Lightning's others.
    """

    def __init__(
        self,
        data_parallel_size: Any = "auto",
        tensor_parallel_size: Any = "auto",
        save_distributed_checkpoint: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **settings)

    @property
    def lightning_restore_optimizer(self) -> bool:  # noqa: D102
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:  # noqa: D102
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:  # noqa: D102
        return Strategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Keep this device's part of the weights."""
        here = self.lightning_module.state_dict()  # type: ignore[union-attr]
        state = {name: as_sharded(weight, here[name]) for name, weight in checkpoint["state_dict"].items()}
        Strategy.load_model_state_dict(self, {"state_dict": state}, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Keep this device's part of the optimiser's states: those that have the shape of their weight."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            state = {
                number: {
                    name: as_sharded(value, weight) if getattr(value, "shape", None) == weight.shape else value
                    for name, value in saved["state"].get(number, {}).items()
                }
                for number, weight in zip(numbers, weights, strict=True)
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, all devices together, or gather everything and write a file."""
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            write_folder(checkpoint, path)
        else:
            Strategy.save_checkpoint(self, tree_map_only(DTensor, self._gathered, checkpoint), path, storage_options)

    def _gathered(self, tensor: DTensor) -> Tensor:
        """Put a tensor together; only the first device, which writes, keeps it."""
        whole = tensor.full_tensor()
        return whole.cpu() if self.is_global_zero else whole.new_empty(0)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or this device's part of a folder."""
        path = Path(self.broadcast(checkpoint_path))
        if (path / META).is_file():
            return read_folder(path, self._tensors_here())
        return Strategy.load_checkpoint(self, path, weights_only)

    def _tensors_here(self) -> dict[str, Tensor]:
        """List the sharded weights under the places that they, their average and their optimiser's states have."""
        weights = {n: w for n, w in self.lightning_module.state_dict().items() if isinstance(w, DTensor)}  # type: ignore[union-attr]
        places: dict[str, Tensor] = {f"state_dict/{name}": weight for name, weight in weights.items()}
        places |= {f"ema/weights/{name}": weight for name, weight in weights.items()}
        for number, optimizer in enumerate(self.optimizers):
            in_order = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            places |= {f"optimizer_states/{number}/state/{place}": weight for place, weight in enumerate(in_order)}
        return places


def supported_strategy(asked: Any) -> Any:
    """Take what a config asks of ``trainer.strategy``, with :class:`ShardedStrategy` in place of Lightning's own.

    Raises:
        UserError: averaged weights and checkpoints are not made for such a strategy.
    """
    name = asked if isinstance(asked, str) else getattr(asked, "class_path", "").rpartition(".")[2]
    if name.lower().startswith(("fsdp", "deepspeed", "xla")):
        raise UserError(
            f"--trainer.strategy {name} is not supported: take ddp, or model_parallel, which shares weights out (FSDP2)"
        )
    if name == "ModelParallelStrategy":
        asked.class_path = f"{ShardedStrategy.__module__}.{ShardedStrategy.__name__}"
    return asked


def check_strategy(strategy: Strategy, model: LightningModule, checkpoint: str | None) -> None:
    """Check that a strategy suits what is trained or measured, and the checkpoint to start from, if there is one.

    Raises:
        UserError: it does not; what to ask for instead.
    """
    is_sharded = isinstance(strategy, ShardedStrategy)
    if is_sharded and not is_overridden("configure_model", model):
        raise UserError(f"{type(model).__name__} cannot share its weights out: take --trainer.strategy=ddp")
    if checkpoint and (Path(checkpoint) / META).is_file() and not is_sharded:
        raise UserError(
            f"{checkpoint} is a sharded checkpoint: read it with --trainer.strategy=model_parallel, on any number of "
            "devices, one included"
        )


StrategyRegistry.register("model_parallel", ShardedStrategy, "weights shared out over devices by FSDP2")

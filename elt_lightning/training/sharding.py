"""Weights shared out over devices (FSDP2): each keeps a part of every weight, of its average and its moments."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from elt_lightning.networks.base import LoopedNetwork


def shard(network: LoopedNetwork, mesh: DeviceMesh) -> None:
    """Share out the weights of a network, once.

    The looped stack is one unit, so that its weights are gathered once per step and their gradients exchanged once,
    however often the loop runs; what stands around the stack is another. Both stay gathered from the forward pass to
    the end of the backward pass: they are needed again at once.

    Args:
        network: of the looped stack, and what stands around it.
        mesh: (copies of the model, devices that share a copy).
    """
    if not isinstance(network, FSDPModule):
        for unit in (network.backbone, network):
            fully_shard(unit, mesh=mesh, reshard_after_forward=False)


def gather_weights(module: nn.Module) -> None:
    """Let every device have all weights, so that it may call the network as often as it needs, whatever others do."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()


def release_weights(module: nn.Module) -> None:
    """Leave every device its part alone, which is what optimiser, average and checkpoints work on."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Put a tensor where a weight is; of a sharded weight, keep the part that this device has of it."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

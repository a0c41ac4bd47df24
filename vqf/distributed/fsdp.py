"""Weights cut into shares, one for each process: torch's fully_shard, and the way there and back.

PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, https://arxiv.org/abs/2304.11277, in its second form,
where a parameter is a DTensor.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqf.distributed import comm

# torch.distributed.fsdp and .tensor take half a second to import, and only runs with shards need them. Such a run has
# tensors with a method `full_tensor`, DTensors.


def shard_module(module: nn.Module, device: torch.device, compiled: bool) -> None:
    """Cut a module's parameters in place: every block of its lists by itself, so that few are whole at a time.

    Only `forward` of a module and of its blocks may be called afterwards, unless inside of `unsharded`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    sync_buffers([module], parameters=True)
    module.to(memory_format=torch.contiguous_format)  # of other orders nothing can be cut
    mesh = init_device_mesh(device.type, (comm.world_size(),))
    for block in blocks(module):
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # The first method that runs makes its module the root for ever, and must not be a block's: this one does nothing.
    module.nothing = lambda: None  # type: ignore[assignment]
    register_fsdp_forward_method(module, "nothing")
    module.nothing()  # type: ignore[operator]
    del module.nothing


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what the outermost lists of a module hold."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Hold all parameters in every process. Every process must enter."""
    from torch.distributed.fsdp import FSDPModule

    parts = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def full_tensor_on_main(value: Any) -> Any:
    """Return a shard's whole tensor in the first process, an empty one in the others; any other value as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    found = value.full_tensor().detach()
    return found.cpu() if comm.is_main() else found.new_empty(0)


def shard_tensor(value: Any, like: Any) -> Any:
    """Return this process's share of a tensor that every process has, if `like` is a shard of that shape."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_norm(norm: Tensor) -> Tensor:
    """Return a norm over all shares as a plain number."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def sync_buffers(modules: Iterable[nn.Module], parameters: bool = False) -> None:
    """Give every process the first one's buffers, and parameters if asked to."""
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for module in modules:
        for tensor in [*module.buffers(), *(module.parameters() if parameters else ())]:
            kinds[tensor.device, tensor.dtype].append(tensor)
    for tensors in kinds.values():  # one message each
        joint = comm.broadcast(torch.cat([each.reshape(-1) for each in tensors]))
        for tensor, piece in zip(tensors, joint.split([each.numel() for each in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

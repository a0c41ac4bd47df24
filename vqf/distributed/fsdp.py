"""FSDP2: sharding a module's parameters over ranks with torch's `fully_shard`.

PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, https://arxiv.org/abs/2304.11277.

torch.distributed.fsdp and .tensor, slow to import, are imported in functions.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqf.distributed import comm


def shard_module(module: nn.Module, device: torch.device, compiled: bool) -> None:
    """Shard a module's parameters in place, block by block.

    Afterwards call only `forward` of the module and its blocks, except inside `unsharded`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    sync_buffers([module], parameters=True)
    module.to(memory_format=torch.contiguous_format)  # fully_shard accepts no other
    mesh = init_device_mesh(device.type, (comm.world_size(),))
    for block in blocks(module):
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # FSDP2 takes the first module that is called for the root, for good. This must not be a block, which may run alone
    # first, so a method that does nothing is called on the parent here.
    root: Any = module
    root.nothing = lambda: None
    register_fsdp_forward_method(module, "nothing")
    root.nothing()
    del root.nothing


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of a module's outermost `ModuleList`s."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather all parameters on every rank; every rank must enter."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)]
    for submodule in sharded:
        submodule.set_reshard_after_forward(False, recurse=False)  # or the first forward would shard it again
        submodule.unshard()
    try:
        yield
    finally:
        for submodule in sharded:
            submodule.reshard()
            submodule.set_reshard_after_forward(True, recurse=False)


def full_tensor_on_main(value: Any) -> Any:
    """Gather a sharded tensor on rank 0, on the CPU (elsewhere it is empty); other values stay."""
    if not isinstance(value, comm.ShardedTensor):
        return value
    full = value.full_tensor().detach()
    return full.cpu() if comm.is_main() else full.new_empty(0)


def shard_tensor(value: Any, like: Any) -> Any:
    """Return this rank's shard of a full tensor if `like` is sharded and has its shape."""
    if not isinstance(like, comm.ShardedTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def sync_buffers(modules: Iterable[nn.Module], parameters: bool = False) -> None:
    """Broadcast the buffers, and perhaps the parameters, of rank 0."""
    tensors_by_kind: dict[Any, list[Tensor]] = defaultdict(list)
    for module in modules:
        for tensor in [*module.buffers(), *(module.parameters() if parameters else ())]:
            tensors_by_kind[tensor.device, tensor.dtype].append(tensor)
    for tensors in tensors_by_kind.values():  # one message per kind, not one per tensor
        flat = comm.broadcast(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))

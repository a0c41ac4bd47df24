"""Collectives over the ranks (processes) of a run; with one process each is the identity.

All ranks must call a collective, in the same order.
"""

import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files."""
    return rank() == 0


def is_initialized() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def local_rank() -> int:
    """Index of this process's GPU on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier() -> None:
    """Wait until every rank is here."""
    any_rank(False)


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on any rank."""
    if world_size() == 1:
        return condition
    flag = torch.tensor(int(condition))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def all_gather_object(value: T) -> list[T]:
    """Return the small values of all ranks, in order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Return the small value of rank 0."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast(tensor: Tensor) -> Tensor:
    """Return the tensor of rank 0; shape and dtype must be the same everywhere."""
    if world_size() == 1:
        return tensor
    result = tensor.detach().contiguous().clone()
    dist.broadcast(result, 0)
    return result


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, without gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, dist.ReduceOp.SUM) / world_size()


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Return the elementwise minimum over ranks, without gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, dist.ReduceOp.MIN)


def all_reduce_scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each scalar over ranks; all ranks need the same keys."""
    means = all_reduce_mean(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    return dict(zip(values, means, strict=True))


def all_reduce_mean_with_grad(tensor: Tensor) -> Tensor:
    """Return the mean over ranks; its gradient goes to this rank's tensor as if the mean were that tensor.

    With a loss f(p) rank r gets f'(p) ∂p_r; DDP's average of these is the gradient of f(p).
    """
    return tensor if world_size() == 1 else all_reduce_mean(tensor.detach()) + (tensor - tensor.detach())


def all_reduce_sum_with_grad(tensor: Tensor) -> Tensor:
    """Return the sum over ranks; its gradient is the sum of theirs, differentiable repeatedly."""
    return tensor if world_size() == 1 else _AllReduceSum.apply(tensor)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum_with_grad(gradient)  # with a gradient of its own, for gradient penalties


def gather_rows(tensor: Tensor, count: int) -> Tensor | None:
    """Concatenate the tensors of all ranks, of one shape, and keep `count` rows; None except on rank 0."""
    if world_size() == 1:
        return tensor[:count]
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(world_size())] if is_main() else None
    dist.gather(tensor, gathered, dst=0)
    return None if gathered is None else torch.cat(gathered)[:count]


@runtime_checkable
class ShardedTensor(Protocol):
    """A `DTensor` of fsdp2, recognized without importing what takes a second to import."""

    device_mesh: Any
    placements: Any
    shape: torch.Size
    device: torch.device

    def full_tensor(self) -> Tensor: ...


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard (fsdp2), or any other tensor."""
    return tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a shard (fsdp2), or any other tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Copy a full value into a tensor that may be sharded."""
    if isinstance(tensor, ShardedTensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def _all_reduce(tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation)
    return result

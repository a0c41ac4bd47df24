"""The processes of one run: which of them this is, and what they say to each other.

torchrun, or a launcher that sets the same variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), starts
them; each sees its own part of every batch. Alone, every function here is the identity, so that nobody has to ask.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqf.errors import UserError

TIMEOUT = timedelta(minutes=30)  # that one process waits for another
REPORT_TIMEOUT = timedelta(seconds=10)  # that a process waits for another to say a line

T = TypeVar("T")

# Who starts processes without telling them where to meet, and by which variable that shows.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}

_store: "dist.Store | None" = None
_failure_posted = False  # whether this process has said why it ends
_lines_read = 0  # how many of the lines that the others left this process has read


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if is_initialized() else 1


def rank() -> int:
    """Return the number of this one, from 0."""
    return dist.get_rank() if is_initialized() else 0


def is_main() -> bool:
    """Tell whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def is_initialized() -> bool:
    """Tell whether this is one of the processes of a launcher, be there only one."""
    return dist.is_available() and dist.is_initialized()


def local_rank() -> int:
    """Return the number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that a launcher started beside this one, and part from them at the end.

    Raises:
        UserError: If the launcher's variables are not complete, or the others do not come.
    """
    global _store, _failure_posted, _lines_read
    if is_initialized() or not _is_launched():
        yield
        return
    import torch.distributed.nn  # before there is a group: its functions would keep it alive as their default

    try:
        _store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.PrefixStore("group", _store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not find each other: {str(error).splitlines()[0]}") from error
    _failure_posted, _lines_read = False, 0
    try:
        yield
        barrier()  # the store lives in the first
    except Exception as error:
        _post_failure(str(error))  # before the others see a broken connection
        raise
    finally:
        count = world_size()
        _leave_group()
        if _failure_posted:
            _wait_for_peers(count)


def _leave_group() -> None:
    """Leave the group, and end its threads.

    One that still holds a tensor when the interpreter ends would abort the process. They end with the last reference
    to the group, and a model spread by DDP, which has one, is part of a cycle. FSDP2 keeps some for good.
    """
    gc.collect()
    dist.destroy_process_group()


def _is_launched() -> bool:
    place = {"MASTER_ADDR", "MASTER_PORT"}
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and (absent := sorted({"RANK", *place} - os.environ.keys())):
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {absent[0]}: start the processes with torchrun")
    if "WORLD_SIZE" not in os.environ:
        _check_single_process()
    return place | {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _check_single_process() -> None:
    """Refuse to be one of several that do not know of each other: they would all write the same run."""
    for variable, starter in LAUNCHERS.items():
        if (count := os.environ.get(variable, "1")) not in ("", "1"):
            raise UserError(
                f"{starter} has started {count} processes ({variable}) that cannot find each other: let it start "
                "torchrun on every node, as examples/slurm/train.sbatch does; or one process, as srun -n 1 does"
            )


def report_once(report: Callable[[], None], message: str) -> None:
    """Let the first process that comes here speak; the others wait until it has spoken.

    Args:
        report: Does it.
        message: What `peer_failure` returns in the others.
    """
    if _store is None:
        report()
        return
    with suppress(RuntimeError):  # the store may have ended with the first process
        _post_failure(message)
        if _store.add("speakers", 1) == 1:
            report()
            _store.set("spoken", "")
        _store.wait(["spoken"], REPORT_TIMEOUT)


def peer_failure() -> str | None:
    """Return why another process has failed, if one has: a broken connection to it is no news then."""
    with suppress(RuntimeError):
        if _store is not None and not _failure_posted and _store.check(["words"]):
            words = _store.get("words").decode()
            _store.add("heard", 1)
            return words
    return None


def _post_failure(message: str) -> None:
    global _failure_posted
    if _store is None or _failure_posted:
        return
    _failure_posted = True
    with suppress(RuntimeError):
        _store.compare_set("words", "", message)
        _store.add("heard", 1)


def _wait_for_peers(process_count: int) -> None:
    """Stay until so many processes know why this one ends: the store that says so may end with it."""
    until = time.monotonic() + REPORT_TIMEOUT.total_seconds()
    with suppress(RuntimeError):
        while _store is not None and _store.add("heard", 0) < process_count and time.monotonic() < until:
            time.sleep(0.02)


def post_line(line: str) -> None:
    """Leave a line for the first process, which may be busy."""
    if _store is not None:
        with suppress(RuntimeError):  # it may have ended
            _store.set(f"line {_store.add('lines', 1)}", line)


def read_lines() -> list[str]:
    """Return what the other processes have left since this was last called, in the first."""
    global _lines_read
    found: list[str] = []
    with suppress(RuntimeError):
        while _store is not None and _lines_read < _store.add("lines", 0):
            found.append(_store.get(f"line {_lines_read + 1}").decode())
            _lines_read += 1
    return found


def all_gather_object(value: T) -> list[T]:
    """Return every process's value, anything small that can be pickled, in all of them."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_object(value: T) -> T:
    """Return the first process's value, anything small that can be pickled, in all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def any_rank(condition: bool) -> bool:
    """Tell whether something is true in any process."""
    if world_size() == 1:
        return condition
    flag = torch.tensor(int(condition))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def barrier() -> None:
    """Wait until every process is here."""
    any_rank(False)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, without a gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean over all processes, without a gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, dist.ReduceOp.SUM) / world_size()


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Return the elementwise minimum over all processes, without a gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, dist.ReduceOp.MIN)


def all_reduce_mean_with_grad(tensor: Tensor) -> Tensor:
    """Return the mean over all processes, with the gradient of this one's tensor.

    For a loss that is a function f of a mean over the batch: with p = mean of p_r, the average of f'(p) ∂p_r over
    processes, which is what their gradients become, is the gradient of f(p).
    """
    return tensor if world_size() == 1 else all_reduce_mean(tensor.detach()) + (tensor - tensor.detach())


def all_reduce_sum_with_grad(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, whose gradient is the sum of theirs: as often differentiable as one likes."""
    return tensor if world_size() == 1 else _AllReduceSum.apply(tensor)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum_with_grad(gradient)


def broadcast(tensor: Tensor) -> Tensor:
    """Return the first process's tensor in all of them; shape and type must be the same everywhere."""
    if world_size() == 1:
        return tensor
    sent = tensor.detach().contiguous().clone()
    _broadcast(sent)
    return sent


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which each process may hold a share, as it does of parameters under fsdp2."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Write into such a tensor a value that every process has."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
    tensor.copy_(value)


def gather_rows(tensor: Tensor, count: int) -> Tensor | None:
    """Return the tensors of all processes behind each other, cut to `process_count` rows, in the first; None in the
    others.

    Args:
        tensor: Of the same shape everywhere.
        count: Of rows that are wanted.
    """
    if world_size() == 1:
        return tensor[:count]
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())] if is_main() else None
    dist.gather(tensor, parts, dst=0)
    return None if parts is None else torch.cat(parts)[:count]


def _all_reduce(tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation)
    return result


def _broadcast(tensor: Tensor) -> None:
    dist.broadcast(tensor, 0)

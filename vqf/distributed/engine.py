"""The engine of a run: device, precision, threads, parallelism (single, DDP, FSDP2) and seeds."""

import inspect
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vqf.distributed import comm, fsdp
from vqf.distributed.devices import find_device, find_rank_device
from vqf.distributed.threads import cpu_threads
from vqf.errors import UserError, unknown_message
from vqf.seeding import hash_seed

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
ENGINES = ("auto", "single", "ddp", "fsdp2")

# DDP's option to broadcast buffers before every forward was renamed in torch 2.15.
_ddp_parameters = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS_OPTION = "forward_sync_buffers" if "forward_sync_buffers" in _ddp_parameters else "broadcast_buffers"

C = TypeVar("C")


@dataclass(frozen=True)
class Engine:
    """Device, precision, and how weights are distributed over ranks.

    Under "ddp" every rank has all weights, under "fsdp2" a shard of weights, gradients and optimizer states.
    """

    device: torch.device
    dtype: torch.dtype  # of autocast
    kind: str = "single"  # "single", "ddp" or "fsdp2"

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, component: C) -> C:
        """Move a module to the device, in channels_last; return any other component as it is."""
        if isinstance(component, nn.Module):
            component.to(self.device).to(memory_format=torch.channels_last)
        return component

    def parallelize(
        self, module: nn.Module, method: str = "forward", *, compiled: bool = False, sharded: bool = True
    ) -> nn.Module:
        """Return a module to call in training in place of `module.method`: its backward averages gradients over ranks.

        Under fsdp2 parameters are replaced, so build the optimizer afterwards.

        Args:
            module: The same on every rank.
            sharded: Whether fsdp2 shards it; a small module is cheaper under DDP.
        """
        called: Any = module if method == "forward" else _MethodModule(module, method)
        if self.kind == "fsdp2" and sharded:
            fsdp.shard_module(module, self.device, compiled)
            return called
        if compiled:
            called = torch.compile(called, dynamic=False)
        if self.kind == "single":
            return called
        # Buffers are synced once a step by `sync_buffers`, not before every forward as DDP would.
        options: dict[str, Any] = {SYNC_BUFFERS_OPTION: False}
        devices = None if self.device.type == "cpu" else [self.device]
        # Gradients are views of the buckets that are sent, which saves a copy of all gradients.
        return DistributedDataParallel(called, devices, gradient_as_bucket_view=True, **options)

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[None]:
        """Under DDP, keep gradients local while `more` micro-batches follow."""
        if more and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def sync_buffers(self, modules: Iterable[nn.Module]) -> None:
        if comm.world_size() > 1:
            fsdp.sync_buffers(modules)

    def unsharded(self, module: nn.Module) -> AbstractContextManager[None]:
        return fsdp.unsharded(module) if self.kind == "fsdp2" else nullcontext()

    # Checkpoints hold full tensors, not shards: any number of ranks, and a single process without torch.distributed,
    # can load them.

    def full_state(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Gather sharded tensors on rank 0, on the CPU; every rank must call this."""
        return {name: fsdp.full_tensor_on_main(tensor) for name, tensor in tensors.items()}

    def shard_state(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: fsdp.shard_tensor(tensor, like.get(name)) for name, tensor in tensors.items()}

    def load_weights(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        module.load_state_dict(self.shard_state(weights, module.state_dict()))

    def full_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return {**state, "state": {number: self.full_state(entry) for number, entry in state["state"].items()}}

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = {
            number: {name: fsdp.shard_tensor(value, parameters[number]) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": entries})


class _MethodModule(nn.Module):
    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.module, self.method)(*arguments)


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32, for losses and norms."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def seed_everything(*parts: int | str) -> None:
    """Seed torch by a hash of `parts` and the rank; rank 0 draws what a single process would."""
    # A hash of the position, so that no RNG state has to be saved. Other ranks see other images.
    torch.manual_seed(hash_seed(*parts, *([f"rank {comm.rank()}"] if comm.rank() else [])))


def make_engine(config: DictConfig) -> Engine:
    """Build the engine of a config.

    Raises:
        UserError: If a value is unknown, or does not fit the machine or the process count.
    """
    kind = _engine_kind(config.engine)
    if config.precision not in PRECISIONS:
        raise UserError(f"precision={config.precision}: {unknown_message('precision', config.precision, PRECISIONS)}")
    _set_float32_precision(ieee=config.precision == "fp32")
    _set_determinism(config.deterministic)
    name = str(config.device)
    device = find_device(name) if comm.world_size() == 1 else find_rank_device(name)
    cpu_threads.configure(config.threads, device)
    return Engine(device, PRECISIONS[config.precision], kind)


def _engine_kind(word: str) -> str:
    if word not in ENGINES:
        raise UserError(f"engine={word}: {unknown_message('engine', word, ENGINES)}")
    if word == "auto":
        return "ddp" if comm.is_initialized() else "single"
    if word == "single" and comm.world_size() > 1:
        raise UserError(f"engine=single: {comm.world_size()} processes were started; engine=ddp or fsdp2 uses them")
    if word != "single" and not comm.is_initialized():
        raise UserError(f"engine={word}: start it with torchrun --nproc-per-node 2 -m vqf.run ..., or use engine=auto")
    return word


def _set_float32_precision(ieee: bool) -> None:
    # This function exists in every version of torch, and torch.compile reads its setting.
    torch.set_float32_matmul_precision("highest" if ieee else "high")
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9 and later
        operations: list[Any] = [cudnn.conv, cudnn.rnn]  # torch wants the two to agree
        for operation in operations:
            operation.fp32_precision = "ieee" if ieee else "tf32"
    else:
        cudnn.allow_tf32 = not ieee


def _set_determinism(deterministic: bool) -> None:
    # https://docs.pytorch.org/docs/stable/notes/randomness.html
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.backends.cudnn.benchmark = False

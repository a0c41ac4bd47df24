"""Where, in which precision and in how many processes the arithmetic happens, and the seeds of its noise.

Everything that several processes need is torch's own: DistributedDataParallel, fully_shard, torchrun. This file
decides which of them is called.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vqf.distributed import comm, fsdp
from vqf.errors import UserError, unknown_message
from vqf.seeding import hash_seed

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
ENGINES = ("auto", "single", "ddp", "fsdp2")

# What DistributedDataParallel calls the sending of buffers before every forward, before torch 2.15 and after.
_ddp_parameters = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS_OPTION = "forward_sync_buffers" if "forward_sync_buffers" in _ddp_parameters else "broadcast_buffers"

C = TypeVar("C")


@dataclass(frozen=True)
class Engine:
    """One device, one precision, and how the weights lie on the processes.

    Under "ddp" every process has all weights. Under "fsdp2" each keeps a share of every weight, of its gradient and
    of what the optimizer remembers, and borrows the rest of a block while the block runs.
    """

    device: torch.device
    dtype: torch.dtype
    kind: str = "single"

    def autocast(self) -> AbstractContextManager[None]:
        """Run what follows in the engine's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, component: C) -> C:
        """Move a module to the device, its convolutions' weights in the order that is fastest there.

        A component that is no module has nothing to move.
        """
        if isinstance(component, nn.Module):
            component.to(self.device).to(memory_format=torch.channels_last)
        return component

    def parallelize(
        self, module: nn.Module, method: str = "forward", *, compiled: bool = False, sharded: bool = True
    ) -> Callable[..., Any]:
        """Return what to call in training in place of `module.method`, so that gradients become those of all parts.

        Under fsdp2 the module's parameters are replaced: build the optimizer afterwards.

        Args:
            module: Placed, and the same in every process.
            method: What computes its part of a loss.
            compiled: Whether torch compiles it.
            sharded: Whether fsdp2 may cut it; a small one is copied to every process instead.
        """
        if self.kind == "fsdp2" and sharded:
            fsdp.shard_module(module, self.device, compiled)
            return module if method == "forward" else getattr(module, method)
        called = module if method == "forward" else _MethodModule(module, method)
        if compiled:
            called = torch.compile(called, dynamic=False)  # type: ignore[assignment]
        if self.kind == "single":
            return called
        buffers: dict[str, Any] = {SYNC_BUFFERS_OPTION: False}
        devices = None if self.device.type == "cpu" else [self.device]
        # Buffers are aligned once a step instead, and gradients lie where they are sent from.
        return DistributedDataParallel(called, devices, gradient_as_bucket_view=True, **buffers)

    def accumulating(self, module: Callable[..., Any], more: bool) -> AbstractContextManager[None]:
        """Hold gradients back while `more` micro-batches follow, where that saves sending them."""
        if more and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def sync_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Give every process the first one's buffers: each has seen other images."""
        if comm.world_size() > 1:
            fsdp.sync_buffers(modules)

    def unsharded(self, module: nn.Module) -> AbstractContextManager[None]:
        """Hold all weights of a module in every process, so that any method of it can be called."""
        return fsdp.unsharded(module) if self.kind == "fsdp2" else nullcontext()

    def full_state(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return tensors as one process alone would have them; where they are shards, only in the first, on the CPU.

        Every process must call it.
        """
        return {name: fsdp.full_tensor_on_main(each) for name, each in tensors.items()}

    def shard_state(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Any]:
        """Undo `full_state`: return of each tensor the share that this process has of `like`."""
        return {name: fsdp.shard_tensor(each, like.get(name)) for name, each in tensors.items()}

    def load_weights(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Load weights that `full_state` gave."""
        module.load_state_dict(self.shard_state(weights, module.state_dict()))

    def full_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state as one process alone would have it, see `full_state`."""
        state = optimizer.state_dict()
        return {**state, "state": {number: self.full_state(each) for number, each in state["state"].items()}}

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load a state that `full_optimizer_state` gave."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = {
            number: {name: fsdp.shard_tensor(each, parameters[number]) for name, each in entry.items()}
            for number, entry in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": entries})


class _MethodModule(nn.Module):
    """A module that is called by one of its methods."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.module, self.method)(*arguments)


def make_engine(config: DictConfig) -> Engine:
    """Read device, precision and engine of a config.

    Raises:
        UserError: If a word is unknown, the device is not there, or the processes do not fit the engine.
    """
    kind = _engine_kind(config.engine)
    if config.precision not in PRECISIONS:
        raise UserError(f"precision={config.precision}: {unknown_message('precision', config.precision, PRECISIONS)}")
    name = str(config.device)
    _set_float32_precision(ieee=config.precision == "fp32")
    _set_determinism(config.deterministic)
    return Engine(
        _find_device(name) if comm.world_size() == 1 else _rank_device(name), PRECISIONS[config.precision], kind
    )


def _set_determinism(deterministic: bool) -> None:
    """Choose whether only kernels run that give the same bits each time; an operation that has none warns.

    https://docs.pytorch.org/docs/stable/notes/randomness.html. cuBLAS reads its variable when it starts.
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


def _set_float32_precision(ieee: bool) -> None:
    """Choose what a GPU does with float32: IEEE's arithmetic, or factors of 10 bits (TF32), torch's default in places.

    Matrices are told by the one call that all versions of torch share, and torch.compile asks for.
    """
    torch.set_float32_matmul_precision("highest" if ieee else "high")
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # since torch 2.9
        kinds: list[Any] = [cudnn.conv, cudnn.rnn]  # the second only so that torch finds both alike
        for kind in kinds:
            kind.fp32_precision = "ieee" if ieee else "tf32"
    else:
        cudnn.allow_tf32 = not ieee


def upcast(tensor: Tensor) -> Tensor:
    """Return at least float32: losses and norms are not taken in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def seed_everything(*parts: int | str) -> None:
    """Seed the noise of what follows as a pure function of `parts` and the process, so that no state needs saving.

    The first process draws what one alone would draw; the others must not, or images of one batch would share
    their noise.
    """
    torch.manual_seed(hash_seed(*parts, *([f"rank {comm.rank()}"] if comm.rank() else [])))


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


def _find_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name}: {reason}; device=auto takes what is there, device=cpu always works") from error
    return device


def _rank_device(name: str) -> torch.device:
    """Return the device of this process among several: a GPU each, or the CPU that they share."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name}: several processes need device=cuda, a GPU each, or device=cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not comm.local_rank() < torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device={name}: process {comm.local_rank()} of this machine has no GPU, there are {count}")
    device = _find_device(f"cuda:{comm.local_rank()}")
    torch.cuda.set_device(device)
    return device

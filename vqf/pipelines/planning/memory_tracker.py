"""Counts the bytes of live tensors, and floating-point operations, while code runs."""

# Not `torch.distributed._tools.mem_tracker.MemTracker`: it is private and has one peak of everything. A plan needs one
# for each engine (with sharded kinds counted in part), kinds for discriminator and EMA, and FLOPs.

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Bytes = Mapping[str, float]  # by kind: weights, gradients, ...


class MemoryTracker(TorchDispatchMode):
    """A context that counts storages by kind; what a kernel allocates and frees internally is not counted.

    Args:
        kind_fractions: For each view (an engine), the fraction of each kind that one process holds; 1 by default.

    Attributes:
        live_bytes: By kind, unscaled.
        peaks: For each view, its bytes by kind when their sum is highest.
        flops: Of matrix products, convolutions and attention; a multiply-add is two.
    """

    def __init__(self, kind_fractions: Mapping[str, Bytes]) -> None:
        from torch.utils.flop_counter import flop_registry  # slow to import

        super().__init__()
        self.kind_fractions, self._flop_counters = kind_fractions, flop_registry
        self.peaks: dict[str, Bytes] = {view: {} for view in kind_fractions}
        self.live_bytes: Counter[str] = Counter()
        self.flops = 0
        self.kind = "activations"
        self._storages: dict[int, tuple[str, int, weakref.ref[Any]]] = {}

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count existing tensors as a kind, or move counted ones to it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._remove_storage(id(storage))
            self._add_storage(storage, kind)

    @contextmanager
    def tracking_optimizer(
        self, parameters: Iterable[Tensor], optimizer: Optimizer, gradients: str, states: str
    ) -> Iterator[None]:
        """Count gradients and optimizer states as the given kinds."""

        def track_gradient(param: Tensor) -> None:
            assert param.grad is not None
            self.track([param.grad], gradients)

        hooks = [
            param.register_post_accumulate_grad_hook(track_gradient) for param in parameters if param.requires_grad
        ]
        hooks.append(optimizer.register_step_pre_hook(lambda *_: self._set_kind(states)))
        hooks.append(optimizer.register_step_post_hook(lambda *_: self._set_kind("activations")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _scalar(args[0], func)
        out = func(*args, **(kwargs or {}))
        count_flops: Callable[..., int] | None = self._flop_counters.get(func._overloadpacket)
        if count_flops is not None:
            self.flops += count_flops(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._storages:  # a view has a known one
                self._add_storage(leaf.untyped_storage(), self.kind)
        return out

    def _add_storage(self, storage: Any, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._storages[key] = kind, size, weakref.ref(storage, lambda _: self._remove_storage(key))
        self.live_bytes[kind] += size
        for view, fractions in self.kind_fractions.items():
            now = {kind: count * fractions.get(kind, 1) for kind, count in self.live_bytes.items()}
            if sum(now.values()) > sum(self.peaks[view].values()):
                self.peaks[view] = now

    def _remove_storage(self, key: int) -> None:
        if key in self._storages:
            kind, size, _ = self._storages.pop(key)
            self.live_bytes[kind] -= size

    def _set_kind(self, kind: str) -> None:
        self.kind = kind


def _scalar(tensor: Tensor, func: Any) -> Any:
    """Return the number in a tensor; 1 for a fake tensor."""
    if type(tensor) is Tensor and not tensor.is_meta:
        return func(tensor)
    return 1.0 if tensor.is_floating_point() else 1

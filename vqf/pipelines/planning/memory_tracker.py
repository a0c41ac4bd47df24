"""Counts the bytes that live and the arithmetic that is done while code runs on tensors."""

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

Bytes = Mapping[str, float]  # by what holds them: weights, gradients, ...


class MemoryTracker(TorchDispatchMode):
    """While it is entered, every storage that an operation makes is entered under what it holds, until it is freed.

    What a kernel allocates and frees inside of itself is not seen.

    Args:
        kind_fractions: By the name of a view, the part of each kind that counts in it, 1 where none is given. The peak
            of a view is the moment at which it holds most.

    Attributes:
        live_bytes: Bytes now, by kind.
        peaks: Bytes at the peak of every view, by kind.
        flops: Multiplications and additions of matrix products, convolutions and attention.
    """

    def __init__(self, kind_fractions: Mapping[str, Bytes]) -> None:
        from torch.utils.flop_counter import flop_registry  # which loads much, and only a plan needs

        super().__init__()
        self.kind_fractions, self._flop_counters = kind_fractions, flop_registry
        self.peaks: dict[str, Bytes] = {view: {} for view in kind_fractions}
        self.live_bytes: Counter[str] = Counter()
        self.flops = 0
        self.kind = "activations"
        self._storages: dict[int, tuple[str, int, weakref.ref[Any]]] = {}

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Enter tensors that are there already under what they hold."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._remove_storage(id(storage))
            self._add_storage(storage, kind)

    @contextmanager
    def tracking_optimizer(
        self, parameters: Iterable[Tensor], optimizer: Optimizer, gradients: str, states: str
    ) -> Iterator[None]:
        """Tell gradients of parameters, and what their optimizer makes for itself, from the rest.

        Args:
            parameters: Leaves.
            optimizer: That steps them.
            gradients: The kind of their gradients.
            states: The kind of what the optimizer makes.
        """

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.track([parameter.grad], gradients)

        hooks = [each.register_post_accumulate_grad_hook(take) for each in parameters if each.requires_grad]
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
        count: Callable[..., int] | None = self._flop_counters.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in self._storages:
                self._add_storage(each.untyped_storage(), self.kind)
        return out

    def _add_storage(self, storage: Any, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._storages[key] = kind, size, weakref.ref(storage, lambda _: self._remove_storage(key))
        self.live_bytes[kind] += size
        for view, share in self.kind_fractions.items():
            now = {each: count * share.get(each, 1) for each, count in self.live_bytes.items()}
            if sum(now.values()) > sum(self.peaks[view].values()):
                self.peaks[view] = now

    def _remove_storage(self, key: int) -> None:
        if key in self._storages:
            kind, size, _ = self._storages.pop(key)
            self.live_bytes[kind] -= size

    def _set_kind(self, kind: str) -> None:
        self.kind = kind


def _scalar(tensor: Tensor, func: Any) -> Any:
    """Return the number in a tensor; 1 where it has no content."""
    if type(tensor) is Tensor and not tensor.is_meta:
        return func(tensor)
    return 1.0 if tensor.is_floating_point() else 1

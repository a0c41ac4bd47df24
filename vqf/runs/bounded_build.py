"""Bounds the size of a model that an untrusted config describes, before memory is allocated for it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from vqf.errors import UserError
from vqf.registry import RegistryError
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.checkpoint_files import BrokenCheckpointError

# For buffers that are not saved, layers that are built but not kept, and modules without tensors.
SPARE_FACTOR, SPARE_TENSORS, SPARE_NUMBERS = 4, 1000, 50_000_000

M = TypeVar("M")


class ModelTooLargeError(Exception):
    """A model with more numbers or layers than its weights can be for."""


def build_bounded(checkpoint: Checkpoint, build_model: Callable[[], M]) -> M:
    """Call `build_model`, first on the meta device, where a model needs no memory.

    Raises:
        BrokenCheckpointError: If the model is much larger than the checkpoint's weights, or cannot be built.
    """
    build_blank(checkpoint, build_model)
    return build_model()


def build_blank(checkpoint: Checkpoint, build_model: Callable[[], M]) -> M:
    """Call `build_model` on the meta device; a component that needs numbers for its construction, on the CPU.

    Raises:
        BrokenCheckpointError: If the model is much larger than the checkpoint's weights, or cannot be built.
    """
    tensors, numbers = checkpoint.count_stored()
    limits = SPARE_FACTOR * tensors + SPARE_TENSORS, SPARE_FACTOR * numbers + SPARE_NUMBERS
    try:
        try:
            return _build(build_model, torch.device("meta"), limits)
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            return _build(build_model, nullcontext(), limits)
    except RegistryError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    except UserError:
        raise
    except ModelTooLargeError as error:
        raise BrokenCheckpointError(
            f"{checkpoint.path}: its config.yaml describes a model of {error}, but its weights are {tensors:,} "
            f"tensors of {numbers:,} numbers"
        ) from error
    except Exception as error:  # any value may be in the config
        reason = (str(error).splitlines() or [""])[0]
        raise BrokenCheckpointError(
            f"{checkpoint.path}: the model in its config.yaml cannot be built ({type(error).__name__}: {reason})"
        ) from error


def _build(build_model: Callable[[], M], device: AbstractContextManager[Any], limits: tuple[int, int]) -> M:
    with device, limited_size(*limits):
        return build_model()


@contextmanager
def limited_size(max_tensors: int, max_numbers: int) -> Iterator[None]:
    """Stop the construction of modules that have more parameters, modules, or numbers in parameters and buffers.

    Raises:
        ModelTooLargeError: From within the constructor of a module.
    """
    tensors = modules = numbers = 0

    def count_tensor(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        tensors, numbers = tensors + 1, numbers + (0 if tensor is None else tensor.numel())
        if tensors > max_tensors:
            raise ModelTooLargeError(f"more than {max_tensors:,} tensors")
        if numbers > max_numbers:
            raise ModelTooLargeError(f"more than {max_numbers:,} numbers")

    def count_module(owner: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > SPARE_FACTOR * max_tensors:
            raise ModelTooLargeError(f"more than {SPARE_FACTOR * max_tensors:,} layers")

    handles = [
        registration.register_module_parameter_registration_hook(count_tensor),
        registration.register_module_buffer_registration_hook(count_tensor),
        registration.register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

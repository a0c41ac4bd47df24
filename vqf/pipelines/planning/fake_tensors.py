"""Training tasks on fake tensors, and emulation of CUDA's memory use."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from vqf.batch import Batch, Sample, Size
from vqf.config.access import image_size
from vqf.dataloading.token_shards import TokenDataset
from vqf.distributed.engine import Engine
from vqf.models.tokenizer import build_tokenizer
from vqf.runs.load import build_generator
from vqf.training.prior_task import PriorTask
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task

C = TypeVar("C")

CHANNELS = 3


@dataclass(frozen=True)
class FakeEngine(Engine):
    """An engine that makes modules fake; their device is always the CPU."""

    mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    def prepare(self, component: C) -> C:
        """Replace parameters and buffers by fake tensors; shared ones stay shared."""
        fakes: dict[int, Tensor] = {}
        for module in component.modules() if isinstance(component, nn.Module) else ():
            for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fakes.setdefault(id(tensor), self._to_fake(tensor))
        return component

    def _to_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        meta = tensor.detach().to("meta")
        if meta.ndim == 4:  # as the real engine lays convolutions out
            meta = meta.contiguous(memory_format=torch.channels_last)
        fake = FakeTensor(self.mode, meta, self.device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class DummyData:
    """A data source of one black image."""

    fingerprint = "none"

    def __init__(self, size: Size, classes: int) -> None:
        self.size = size
        self.classes: Sequence[str] = [str(i) for i in range(classes)]

    def split(self, name: str) -> "DummyData":
        return self

    def __len__(self) -> int:
        return 1

    def item(self, epoch: int, index: int) -> Sample:
        return Sample(torch.zeros(CHANNELS, *self.size), label=0)


def tokenizer_task(config: DictConfig, engine: Engine, classes: int) -> TokenizerTask:
    """Build the task of stage 1 without data."""
    return build_tokenizer_task(config, DummyData(image_size(config), classes), engine)


def prior_task(config: DictConfig, engine: Engine, classes: int) -> PriorTask:
    """Build the task of stage 2 on an untrained tokenizer."""
    tokenizer = build_tokenizer(config.model, image_size(config), CHANNELS).eval().requires_grad_(False)
    names = [str(i) for i in range(classes)]
    generator = engine.prepare(build_generator(config, engine.prepare(tokenizer), names))
    return PriorTask(generator, TokenDataset([], 0), {}, config, engine)  # no data: it is never evaluated


def image_batch(count: int, size: Size, device: torch.device) -> Batch:
    """Return a batch of noise with all fields."""
    noise = torch.rand(count, CHANNELS, *size, device=device) * 2 - 1
    labels = torch.zeros(count, dtype=torch.long, device=device)
    return Batch(images=noise, labels=labels, conditions=noise, crop_boxes=torch.zeros(count, 4, device=device))


def token_batch(task: PriorTask, count: int, device: torch.device) -> Batch:
    """Return a batch of random tokens and conditions."""
    tokenizer = task.generator.tokenizer
    conditions = task.generator.conditioner.prepare(image_batch(count, tokenizer.image_size, device))
    tokens = torch.zeros(count, tokenizer.layout.length, dtype=torch.int64, device=device)
    return replace(conditions, images=None, conditions=None, tokens=tokens)


# Operations that autocast computes in float32 on CUDA, but in bfloat16 on the CPU
# (https://docs.pytorch.org/docs/stable/amp.html).
AUTOCAST_TO_FLOAT32 = {
    *("acos", "asin", "cosh", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "exp", "expm1"),
    *("group_norm", "interpolate", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax"),
    *("mse_loss", "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "smooth_l1_loss", "softmax"),
    *("softplus", "square", "sum", "tan"),
}


class CudaAutocastEmulation(TorchFunctionMode):
    """Makes operations on fake CPU tensors save what they would save on CUDA.

    There, autocast computes more in float32, dropout saves a mask of bytes, and attention saves none.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_to_float32(value) for value in args]
            kwargs = {key: _to_float32(value) for key, value in kwargs.items()}
        if name == "scaled_dot_product_attention":
            kwargs["dropout_p"] = 0.0
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def emulate_device(
    device: torch.device, optimizers: Mapping[str, torch.optim.Optimizer]
) -> AbstractContextManager[Any]:
    """Return a context in which fake tensors use memory as on a device; sets `foreach` of optimizers."""
    if device.type != "cuda":
        return nullcontext()
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # the default on CUDA
    return CudaAutocastEmulation()


def _to_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

"""The stages that are trained, on tensors that have a shape and no content: what a plan is made from."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from vqf.batch import Batch, Sample, Size
from vqf.config.access import image_size
from vqf.distributed.engine import Engine
from vqf.models.tokenizer import build_tokenizer
from vqf.runs.load import build_generator
from vqf.training.prior_task import PriorTask
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task

C = TypeVar("C")

CHANNELS = 3


@dataclass(frozen=True)
class FakeEngine(Engine):
    """Places modules on tensors without content. They call themselves CPU tensors whatever is planned for."""

    mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    def prepare(self, component: C) -> C:
        """Replace the content of every parameter and buffer by none."""
        known: dict[int, Tensor] = {}
        for module in component.modules() if isinstance(component, nn.Module) else ():
            every: list[dict[str, Any]] = [module._parameters, module._buffers]
            for tensors in every:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = known.setdefault(id(tensor), self._to_fake(tensor))
        return component

    def _to_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        shape = tensor.detach().to("meta")
        if shape.ndim == 4:
            shape = shape.contiguous(memory_format=torch.channels_last)
        fake = FakeTensor(self.mode, shape, self.device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class DummyData:
    """A data source whose images nobody looks at."""

    fingerprint = "none"

    def __init__(self, size: Size, classes: int) -> None:
        self.size = size
        self.classes: Sequence[str] = [str(i) for i in range(classes)]

    def split(self, name: str) -> "DummyData":
        """Return the only part there is."""
        return self

    def __len__(self) -> int:
        return 1

    def item(self, epoch: int, index: int) -> Sample:
        """Return a black image."""
        return Sample(torch.zeros(CHANNELS, *self.size), label=0)


def tokenizer_task(config: DictConfig, engine: Engine, classes: int) -> TokenizerTask:
    """Build stage 1 without data."""
    return build_tokenizer_task(config, DummyData(image_size(config), classes), engine)


def prior_task(config: DictConfig, engine: Engine, classes: int) -> PriorTask:
    """Build stage 2 without data, on a tokenizer that was never trained."""
    tokenizer = build_tokenizer(config.model, image_size(config), CHANNELS).eval().requires_grad_(False)
    names = [str(i) for i in range(classes)]
    generator = engine.prepare(build_generator(config, engine.prepare(tokenizer), names))
    return PriorTask(generator, None, {}, config, engine)  # type: ignore[arg-type]  # it is not evaluated


def image_batch(count: int, size: Size, device: torch.device) -> Batch:
    """Return a batch with every field that a data source may give."""
    noise = torch.rand(count, CHANNELS, *size, device=device) * 2 - 1
    labels = torch.zeros(count, dtype=torch.long, device=device)
    return Batch(images=noise, labels=labels, conditions=noise, crop_boxes=torch.zeros(count, 4, device=device))


def token_batch(task: PriorTask, count: int, device: torch.device) -> Batch:
    """Return a batch of tokens, and of what the conditioners make of images."""
    tokenizer = task.generator.tokenizer
    told = task.generator.conditioner.prepare(image_batch(count, tokenizer.image_size, device))
    height, width = tokenizer.grid
    tokens = torch.randint(tokenizer.vocab_size, (count, height * width), device=device)
    return replace(told, images=None, conditions=None, tokens=tokens)


# https://docs.pytorch.org/docs/stable/amp.html: what CUDA's autocast widens to float32, and the CPU's leaves narrow.
AUTOCAST_TO_FLOAT32 = {
    *("acos", "asin", "cosh", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "exp", "expm1"),
    *(
        "group_norm",
        "interpolate",
        "kl_div",
        "l1_loss",
        "layer_norm",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_softmax",
        "mse_loss",
    ),
    *("nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "smooth_l1_loss", "softmax", "softplus"),
    *("square", "sum", "tan"),
}


class CudaAutocastEmulation(TorchFunctionMode):
    """Lets tensors that call themselves the CPU's be kept as a CUDA device would keep them.

    Autocast widens more operations there; dropout keeps a mask of bytes, and inside attention none.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = (
                [_to_float32(each) for each in args],
                {key: _to_float32(each) for key, each in kwargs.items()},
            )
        if name == "scaled_dot_product_attention":
            kwargs["dropout_p"] = 0.0
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def emulate_device(
    device: torch.device, optimizers: Mapping[str, torch.optim.Optimizer]
) -> AbstractContextManager[Any]:
    """Do what follows as it would be done on a device."""
    if device.type != "cuda":
        return nullcontext()
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # the default there
    return CudaAutocastEmulation()


def _to_float32(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

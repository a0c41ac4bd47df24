"""What a caller would write to turn what was passed into what a model takes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqf.errors import UserError

# Resampling overshoots [-1, 1]; the white of an image normalized with the statistics of ImageNet is beyond this.
LARGEST_VALUE = 1.5


@dataclass(frozen=True)
class Given:
    """An argument as a tensor."""

    tensor: Tensor
    code: str  # the expression that makes it a tensor
    kind: str = ""  # what it is, unless a tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def is_integer(self) -> bool:
        return not (self.tensor.is_floating_point() or self.tensor.is_complex() or self.tensor.dtype == torch.bool)

    def __str__(self) -> str:
        return f"{self.shape} {str(self.tensor.dtype).removeprefix('torch.')}{self.kind}"


def read(value: Any, name: str, mode: str = "RGB") -> Given:
    """Read a tensor, numpy array or PIL image, or a list of these or of numbers.

    Args:
        name: Of the argument.
        mode: Of PIL images.

    Raises:
        UserError: If it is something else.
    """
    if isinstance(value, Tensor):
        return Given(value, name)
    try:
        return _convert(value, name, mode)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be a tensor, not {type(value).__name__}") from error


def _convert(value: Any, name: str, mode: str) -> Given:
    if isinstance(value, Image.Image):
        code = f'torch.from_numpy(numpy.array({name}.convert("{mode}")))'
        return Given(torch.from_numpy(np.array(value.convert(mode))), code, ", a PIL image")
    if isinstance(value, np.ndarray):
        flipped = any(stride < 0 for stride in value.strides)
        code = f"torch.from_numpy({name}{'.copy()' if flipped else ''})"
        return Given(torch.from_numpy(value.copy()), code, ", a numpy array")
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor | np.ndarray | Image.Image):
        items = [read(each, "each", mode) for each in value]
        code = name if items[0].code == "each" else f"[{items[0].code} for each in {name}]"
        return Given(torch.stack([each.tensor for each in items]), f"torch.stack({code})", ", a list")
    if isinstance(value, list | tuple):
        return Given(torch.tensor(value), f"torch.tensor({name})", ", a list")
    raise TypeError


def reorder_axes(shape: tuple[int, ...], channels: int) -> str | None:
    """The step from a shape to (B, C, H, W), empty if it is that; None if it cannot be told."""
    if len(shape) == 2:
        rest = reorder_axes((1, *shape), channels)
        return rest and f"[None]{rest}".replace("[None][None]", "[None, None]")
    axes = {4: {1: "", 3: ".permute(0, 3, 1, 2)"}, 3: {0: "[None]", 2: ".permute(2, 0, 1)[None]"}}.get(len(shape), {})
    selections = {channels: ""}
    if channels == 3:  # gray, and colors with opacity
        selections |= {1: ".expand(-1, 3, -1, -1)", 4: "[:, :3]"}
    return next(
        (step + select for count, select in selections.items() for axis, step in axes.items() if shape[axis] == count),
        None,
    )


def rescale(tensor: Tensor) -> tuple[str, str | None]:
    """The values of images if they are not in [-1, 1], and the step that brings them there, if it can be told."""
    if tensor.dtype == torch.bool:
        return "", ".float() * 2 - 1"
    if not tensor.is_floating_point():
        return "", f".float() / {_half_range(limits(tensor.double())[1]):g} - 1"
    low, high = limits(tensor)
    if -LARGEST_VALUE <= low and high <= LARGEST_VALUE:
        return "", ""
    if not np.isfinite([low, high]).all():
        return " with NaN or infinity", ".nan_to_num(0, 1, -1)"
    return f" from {low:.4g} to {high:.4g}", None if low < 0 else f" / {_half_range(high):g} - 1"


def limits(tensor: Tensor) -> tuple[float, float]:
    """Smallest and largest value, both NaN if there is one; 0 of no values."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return low, high


def _half_range(high: float) -> float:
    return 127.5 if high <= 255 else 32767.5

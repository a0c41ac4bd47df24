"""Checks of images, indices, tokens, masks and numbers that a caller passes.

Each raises a `UserError` of one line: what was given, and what to write instead. Values are read with one reduction,
for which the host waits if they are on a GPU. So only methods for callers check them, once a call.
"""

import itertools
import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.errors import UserError
from vqf.models.conversions import Given, limits, read, reorder_axes, rescale
from vqf.tokens.layout import TokenLayout

# What to write where these are tokens: of the layout of training, and of another size.
DECODE_TOKENS = ("tokenizer.decode_tokens({})", "tokenizer.decode_tokens({}, tokenizer.layout_of((rows, columns)))")
UNFLATTEN = ("generator.tokenizer.layout.unflatten({})", "generator.tokenizer.layout_of((rows, columns)).unflatten({})")


def check_images(images: Any, channels: int, name: str = "images") -> Tensor:
    """Return images (B, C, H, W) in [-1, 1], floats of any precision, as they are.

    Resampling overshoots: values up to 1.5 pass. So do images in [0, 1], which no value tells from dark ones.
    """
    given = read(images, name, "L" if channels == 1 else "RGB")
    axes, (values, scale) = reorder_axes(given.shape, channels), rescale(given.tensor)
    if given.tensor is images and axes == scale == "":
        return given.tensor
    cure = "" if axes is None else f"; write {given.code}{axes}{scale}"
    if scale is None:
        cure = f"; undo their normalization, as in ({name} * std + mean) * 2 - 1"
    raise UserError(f"{name} must be (B, {channels}, H, W) in [-1, 1], not {given}{values}{cure}")


def check_size(height: int, width: int, stride: int | None, image_size: Size) -> None:
    """Check that a tokenizer takes images of this size."""
    if stride is None:
        if (height, width) != image_size:
            raise UserError(
                f"images must be {image_size[0]} x {image_size[1]} pixels, not {height} x {width}; write "
                f'torch.nn.functional.interpolate(images, {image_size}, mode="bicubic", antialias=True)'
            )
    elif height % stride or width % stride or not (height and width):
        rows, columns = height // stride * stride, width // stride * stride
        crop = f"; write images[..., :{rows}, :{columns}] to crop them" if rows and columns else ""
        raise UserError(
            f"image height and width must be multiples of the encoder's stride {stride}, not {height} x {width}{crop}"
        )


def check_indices(
    indices: Any, layout: TokenLayout, name: str = "indices", tokens: tuple[str, str] = DECODE_TOKENS
) -> Tensor:
    """Return indices as int64: (B, h, w), with K codebooks (B, h, w, k), with scales (B, t).

    They may be those of the first codebooks or scales alone, and of an image of any size. Codes are not read.
    """
    given = read(indices, name)
    code = _as_integers(given)
    if _are_indices(given.shape, layout):
        if code == name:
            return given.tensor.long()
        cure = f"; write {code}"
    elif _are_tokens(given.shape, layout):
        cure = f"; write {tokens[0].format(code)}"
    elif _are_indices((1, *given.shape), layout):
        cure = f"; write {code}[None]"
        if len(given.shape) == 2 and given.shape != layout.grid:
            cure += f" if this is one grid, {tokens[1].format(code)} if these are tokens"
    else:
        cure = ""
    raise UserError(f"{name} must be {_index_shape(layout)} integers, not {given}{cure}")


def check_start(images: Any, layout: TokenLayout) -> Tensor | None:
    """Return the indices of images to complete, as int64; None if these are rather images. Codes are not read."""
    given = read(images, "images")
    if not given.tensor.numel():
        raise UserError(f"images: none to complete, {given}")
    return check_indices(images, layout, "images", UNFLATTEN) if _may_be_indices(given, layout) else None


def _may_be_indices(given: Given, layout: TokenLayout) -> bool:
    """Whether these are rather indices, or tokens, than images."""
    if _are_tokens(given.shape, layout) or given.shape == layout.grid:
        return True
    if not (_are_indices(given.shape, layout) or _are_indices((1, *given.shape), layout)):
        return False
    is_image = given.tensor.is_floating_point() or given.tensor.dtype == torch.uint8
    return given.shape[1:3] == layout.grid or not is_image


def check_tokens(tokens: Any, layout: TokenLayout) -> Tensor:
    """Return tokens (B, T) as int64. Codes are not read."""
    given = read(tokens, "tokens")
    cure = _as_integers(given)
    if _are_tokens(given.shape, layout):
        if cure == "tokens":
            return given.tensor.long()
    elif _are_tokens((1, *given.shape), layout):
        cure += "[None]"
    elif _are_indices(given.shape, layout):
        cure = f"tokenizer.decode({cure})"
    elif layout.is_raster:
        cure = f"tokenizer.decode_tokens({cure}, tokenizer.layout_of((rows, columns))) for another size"
    else:
        cure = ""
    raise UserError(f"tokens must be (B, {layout.length}) integers, not {given}{cure and f'; write {cure}'}")


def check_codes(indices: Tensor, layout: TokenLayout, name: str) -> Tensor:
    """Return indices or tokens as they are, if every code is one of its codebook."""
    if not indices.numel():
        return indices
    by_codebook = indices.reshape(-1, indices.shape[3] if indices.ndim == 4 else layout.codebooks)
    ends = torch.stack(torch.aminmax(by_codebook, dim=0)).T.tolist()
    for k, ((low, high), size) in enumerate(zip(ends, layout.vocab_sizes, strict=False)):
        if low >= 0 and high < size:
            continue
        codes = "codes" if layout.codebooks == 1 else f"codes of codebook {k}"
        reason = "these are of another tokenizer, or damaged"
        if low == -1:
            reason = "-1 stands for an unknown token, which generator.complete(images, mask) draws"
        raise UserError(f"{name}: {codes} are 0 to {size - 1}, not {low if low < 0 else high}; {reason}")
    return indices


def check_mask(mask: Any) -> Tensor:
    """Return a mask (H, W) or (B, H, W) as bool. Numbers must be 0 and one above, such as 1 or 255."""
    given = read(mask, "mask", "L")
    tensor, code = given.tensor, given.code
    low, high = (0.0, 1.0) if tensor.dtype == torch.bool else limits(tensor)
    is_binary = tensor.dtype == torch.bool or bool(((tensor == 0) | ((tensor == high) & (tensor > 0))).all())
    if tensor is mask and tensor.ndim in (2, 3) and is_binary:
        return tensor.bool()
    code += "[:, 0]" if tensor.ndim == 4 else ""
    code += "" if is_binary else f" > {(low + high) / 2 if low < high else 0:g}"
    cure = "" if code == "mask" else f"; write {code}"
    raise UserError(f"mask must be (H, W) or (B, H, W), True where an image is known, not {given}{cure}")


def whole_number(name: str, value: Any, minimum: int = 1) -> int:
    """Return an integer of any kind, such as numpy's, as int."""
    try:
        number = operator.index(value)
    except TypeError:
        _refuse_number(name, value, minimum)
    return number if number >= minimum else _refuse_number(name, value, minimum)


def check_seed(seed: Any) -> int:
    """Return a seed in [0, 2^64) as int."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if 0 <= number < 2**64:
        return number
    raise UserError(
        f"seed={seed!r}: must be a whole number from 0 to 2**64 - 1; write seed=0, or import random and write "
        "seed=random.randrange(2**63) for another each time"
    )


def _refuse_number(name: str, value: Any, minimum: int) -> NoReturn:
    near = int(value) if isinstance(value, float | str) and str(value).removesuffix(".0").isdecimal() else minimum
    raise UserError(f"{name}={value!r}: must be a whole number of at least {minimum}; write {name}={near}")


def _are_tokens(shape: tuple[int, ...], layout: TokenLayout) -> bool:
    return len(shape) == 2 and shape[1] == layout.length


def _are_indices(shape: tuple[int, ...], layout: TokenLayout) -> bool:
    if len(layout.scales) > 1:
        return len(shape) == 2 and shape[1] in itertools.accumulate(layout.groups())
    if layout.codebooks > 1 and (len(shape) != 4 or not 1 <= shape[3] <= layout.codebooks):
        return False
    if layout.codebooks == 1 and len(shape) != 3:
        return False
    return layout.stride is not None or shape[1:3] == layout.scales[0]


def _index_shape(layout: TokenLayout) -> str:
    if len(layout.scales) > 1:
        return f"(B, {layout.length})"
    cells = "h, w" if layout.stride is not None else ", ".join(map(str, layout.scales[0]))
    return f"(B, {cells})" if layout.codebooks == 1 else f"(B, {cells}, {layout.codebooks})"


def _as_integers(given: Given) -> str:
    return given.code if given.is_integer else f"{given.code}.long()"

"""Validation of a sampling call."""

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from vqf.batch import Size
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Causal, Masked, Prior, Sampler, Windowed
from vqf.registry import components
from vqf.tokens.layout import TokenLayout


def layout_for_size(size: int | Sequence[int], tokenizer: Tokenizer) -> TokenLayout:
    """The layout of the tokens of an image of `size` pixels.

    Raises:
        UserError: If the stride does not divide it, or the tokenizer has no tokens for that size.
    """
    height, width = _read_size(size)
    stride = tokenizer.stride
    if stride is None:
        if (height, width) != tokenizer.image_size:
            trained = " x ".join(map(str, tokenizer.image_size))
            raise UserError(
                f"size=[{height},{width}]: the {tokenizer.layout.length} tokens of this tokenizer have no places in "
                f"the image; it draws {trained} pixels alone, so leave size out"
            )
        return tokenizer.layout
    if height % stride or width % stride:
        near = [max(round(each / stride), 1) * stride for each in (height, width)]
        raise UserError(
            f"size=[{height},{width}]: the tokenizer's stride {stride} must divide it; "
            f"the nearest that fits is size=[{near[0]},{near[1]}]"
        )
    try:
        return tokenizer.layout_of((height // stride, width // stride))
    except ValueError as error:  # a pyramid of scales of one size
        raise UserError(f"size=[{height},{width}]: {error}") from error


def known_token_mask(mask: Tensor, layout: TokenLayout, count: int) -> Tensor:
    """Which tokens (B, T) of `count` images are known: those whose pixels all are.

    Args:
        mask: True where known: (h, w) in cells or (H, W) in pixels, with or without a batch dimension.

    Raises:
        UserError: If the tokens are not those of one grid.
        ValueError: If the mask has another shape.
    """
    (height, width), stride = check_raster(layout, "mask")
    if mask.ndim == 3 and len(mask) not in (1, count):
        raise ValueError(f"mask: {len(mask)} masks for {count} images; give one for each, or one for all")
    mask = mask.expand(count, *mask.shape[-2:])
    if mask.shape[1:] == (height * stride, width * stride):
        mask = mask.unflatten(2, (width, stride)).unflatten(1, (height, stride)).all(dim=4).all(dim=2)
    elif mask.shape[1:] != (height, width):
        raise ValueError(
            f"the mask must be ({height}, {width}) in tokens or ({height * stride}, {width * stride}) in pixels, "
            f"not {tuple(mask.shape[1:])}"
        )
    return layout.cells_to_tokens(mask)


def check_raster(layout: TokenLayout, what: str) -> tuple[Size, int]:
    """The grid and the stride of a layout.

    Raises:
        UserError: If the tokens are not those of one grid of cells with places; `what` needs them.
    """
    if layout.grid is None or layout.stride is None:
        raise UserError(f"{what}: the {layout.length} tokens of this tokenizer have no places in the image")
    if not layout.is_raster:
        raise UserError(
            f"{what}: the tokens of this tokenizer are a pyramid of {len(layout.scales)} scales, each of the full "
            "image; a part of the image has no tokens of its own"
        )
    return layout.grid, layout.stride


def check_sampler(
    sampler: Sampler, prior: Prior, conditioner: ConditionerStack, layout: TokenLayout, keeps_known: bool
) -> None:
    """Check that a sampler can sample a layout from a prior, and keep known tokens.

    Raises:
        UserError: If it cannot.
    """
    if isinstance(sampler, Windowed):
        _check_windows(sampler, prior, conditioner)
    elif not layout.starts(prior.layout):
        _refuse_layout(layout, prior.layout)
    if keeps_known and not sampler.keeps_known:
        raise UserError("sampler: this one cannot keep known tokens; sampler=autoregressive does")


def _check_windows(sampler: Windowed, prior: Prior, conditioner: ConditionerStack) -> None:
    (rows, columns), _ = check_raster(prior.layout, "sampler=sliding_window")
    if prior.layout.codebooks > 1:
        raise UserError(
            f"sampler=sliding_window: draws one token a cell, and here a cell has {prior.layout.codebooks}; "
            "sampler=autoregressive draws images of the size of training"
        )
    window = sampler.window
    if window is not None and window != (rows, columns) and conditioner.fields:
        raise UserError(
            f"sampler.window=[{window[0]},{window[1]}]: this prior reads {', '.join(sorted(conditioner.fields))} of "
            f"windows of {rows} x {columns} tokens, as in training; leave sampler.window out"
        )


def _refuse_layout(layout: TokenLayout, trained: TokenLayout) -> NoReturn:
    """Of a raster, the tokens of fewer rows are the start of a trained sequence; those of other columns are not."""
    if layout.grid is None or trained.grid is None or layout.stride is None:
        raise UserError(f"size: the prior was trained on {trained} tokens, not on {layout}")
    requested, known = (f"{h * layout.stride} x {w * layout.stride}" for h, w in (layout.grid, trained.grid))
    slides = trained.is_raster and trained.codebooks == 1
    cure = "sampler=sliding_window samples larger ones" if slides else "leave size out"
    raise UserError(f"size: the prior was trained on images of {known} pixels, not {requested}; {cure}")


def check_pair(sampler: Sampler, prior: Prior, names: tuple[str, str]) -> None:
    """Check that a sampler draws from a prior's kind, `names` of both.

    Raises:
        UserError: If it does not.
    """
    if isinstance(prior, sampler.draws):
        return
    samplers: list[tuple[str, Any]] = [(each.name, each.target) for each in components("sampler")]
    fitting = [name for name, target in samplers if isinstance(prior, target.draws)]
    kinds = [kind.__name__.lower() for kind in (Causal, Masked) if isinstance(prior, kind)]
    raise UserError(
        f"sampler={names[0]}: draws from priors that are {sampler.draws.__name__.lower()}, and prior '{names[1]}' is "
        f"{' and '.join(kinds) or 'neither causal nor masked'}; choose sampler={' or '.join(fitting) or 'of your own'}"
    )


def _read_size(size: Any) -> Size:
    try:
        sides = [operator.index(size)] * 2 if getattr(size, "ndim", 1) == 0 or isinstance(size, int) else size
        height, width = (operator.index(each) for each in sides)
    except (TypeError, ValueError) as error:
        raise UserError(f"size={size}: must be one number, or height and width as size=[512,768]") from error
    if height < 1 or width < 1:
        raise UserError(f"size=[{height},{width}]: height and width must be at least 1")
    return height, width

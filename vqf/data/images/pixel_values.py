"""Gray images of more than 8 bits: which values are black and white."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vqf.options.ranges import Number

PixelRange = tuple[Number, Number]  # the values that become black and white
ValueLimits = tuple[float, float]  # the least and the largest value of an image

FULL_RANGE = (0, 65535)  # of 16 bits
DARK = 2**14  # an image of 16 bits whose values all are below this becomes dark: a camera of 14 bits or fewer made it


class UnreadableError(ValueError):
    """An image file that is missing, broken, of an unknown format, or too large."""


def check_range(option: str, values: Sequence[float] | None) -> PixelRange | None:
    """Check the option of a range.

    Raises:
        ValueError: If it is not two numbers, the smaller one first.
    """
    if values is None:
        return None
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] >= values[1]:
        raise ValueError(f"{option}={list(values)} is not the values of black and white, the smaller one first")
    return float(values[0]), float(values[1])


def is_deep(image: Image.Image) -> bool:
    """Whether an image is gray with more than 8 bits: I, I;16, I;16B, F."""
    return image.mode.startswith(("I", "F"))


def value_limits(image: Image.Image) -> ValueLimits | None:
    """Return the least and the largest value of an image of more than 8 bits, None for others."""
    return limits_of(image) if is_deep(image) else None


def limits_of(image: Image.Image) -> ValueLimits:
    values = np.asarray(image)
    return float(values.min()), float(values.max())


def to_grey(image: Image.Image, pixel_range: PixelRange | None, option: str) -> Image.Image:
    """Convert an image of more than 8 bits to 8-bit grayscale; values beyond the range are black and white.

    Raises:
        UnreadableError: If it needs a range and there is none, or holds values that are no numbers.
    """
    limits = limits_of(image)
    if any(map(math.isnan, limits)):
        raise UnreadableError("pixels that are no numbers (nan)")
    if pixel_range is None and image.mode == "F":
        raise UnreadableError(f"floating-point pixels, which have no defined range; {_range_option(option, limits)}")
    if pixel_range is None and (limits[0] < FULL_RANGE[0] or limits[1] > FULL_RANGE[1]):
        raise UnreadableError(f"values outside of 0 to 65535; {_range_option(option, limits)}")
    low, high = pixel_range or FULL_RANGE
    values = np.asarray(image, dtype=np.float64).clip(low, high)
    return Image.fromarray(np.round((values - low) / ((high - low) / 255)).astype(np.uint8))


def dark_message(name: str, limits: ValueLimits | None, pixel_range: PixelRange | None) -> str | None:
    """Return a line about an image that becomes dark because it does not use its 16 bits; else None."""
    if limits is None or pixel_range is not None or not 0 < limits[1] < DARK:
        return None
    return (
        f"data.range: {name} has values of {limits[0]:g} to {limits[1]:g} where 65535 is white, and becomes dark; "
        f"{_range_option('data.range', limits)} (pipeline=check shows the values of all images)"
    )


def _range_option(option: str, limits: ValueLimits) -> str:
    low, high = limits
    return f"give the values of black and white, as in {option}=[{low:g},{max(high, low + 1):g}]"

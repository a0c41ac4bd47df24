"""Ranges beside types: names of the common ones, and the check of a value against its annotation.

`dropout: Rate = 0.0` in a signature states type and range. Other ranges are written with annotated-types, as in
`Annotated[int, Interval(ge=1, le=100)]`, lengths of lists as in `Annotated[Sequence[int], Len(1)]`. Numbers are finite,
unless `le=math.inf` says otherwise, and integers have at most 64 bits.
"""

import inspect
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

Number = Annotated[float, "finite, without bounds"]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Dimension = Annotated[int, Interval(ge=1, le=2**20)]  # of a weight: channels, codes, heads
Depth = Annotated[int, Interval(ge=1, le=1000)]  # modules one after the other
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Rate = Annotated[float, Interval(ge=0, lt=1)]  # of a dropout or decay
StepsOrFraction = Annotated[int | float, Interval(ge=0, le=10**12)]  # below 1 a fraction of the run
PositiveFraction = Annotated[float, Interval(gt=0, le=1)]
AnyLabel = Annotated[int, Interval(ge=-(2**31), lt=2**31)]  # of a pixel of a label map
Side = Annotated[int, Interval(ge=1, le=2**16)]
Sides = Side | tuple[Side, Side]  # one number for both, or height and width

LIMITS: dict[str, Callable[[Any, Any], bool]] = {  # by the attribute that holds the bound in annotated-types
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "min_length": lambda value, least: len(value) >= least,
    "max_length": lambda value, most: len(value) <= most,
}
NUMBERS: dict[Any, tuple[Any, float]] = {int: (Integral, 2**63 - 1), float: (Real, sys.float_info.max)}
WORDS = {
    Any: "anything",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}


def mismatch(hint: Any, value: Any) -> str | None:
    """What a value must be by its annotation; None if it is."""
    if fits(hint, value):
        return None
    excess = next(filter(None, map(_excess, _numbers(value))), "")
    return f"must be {describe(hint)}{excess}"


def fits(hint: Any, value: Any) -> bool:
    """Whether a value has the type and range of an annotation; a list may stand for any sequence."""
    origin, arguments = _parse(hint)
    if origin is Annotated:
        bounds = _bounds(hint)
        is_type = value == bounds.get("le") == math.inf or fits(arguments[0], value)
        return is_type and all(LIMITS[name](value, bound) for name, bound in bounds.items())
    if origin is typing.Union:
        return any(fits(each, value) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin in NUMBERS:
        kind, largest_integer = NUMBERS[origin]
        return isinstance(value, kind) and not isinstance(value, bool) and not _excess(value, largest_integer)
    if origin in (str, Path):
        return isinstance(value, str | Path)
    return origin is Any or not inspect.isclass(origin) or _fits_class(origin, arguments, value)


def _fits_class(origin: type, arguments: Sequence[Any], value: Any) -> bool:
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(arguments[1], each) for each in value.values() if arguments)
    if not issubclass(origin, Sequence):
        return isinstance(value, origin)
    if not isinstance(value, list | tuple):
        return False
    elements, fixed = _elements(origin, arguments)
    elements = elements if fixed else elements * len(value)
    return len(elements) == len(value) and all(map(fits, elements, value))


def convert(hint: Any, value: Any) -> Any:
    """Convert integers to floats where an annotation says so: torch takes no others for `betas`, nor beyond 64 bits."""
    origin, arguments = _parse(hint)
    if origin is Annotated:
        return convert(arguments[0], value)
    if origin is typing.Union:
        return convert(next(each for each in arguments if fits(each, value)), value)
    if origin is float:
        return float(value)
    if inspect.isclass(origin) and isinstance(value, list | tuple):
        elements, fixed = _elements(origin, arguments)
        return type(value)(map(convert, elements if fixed else elements * len(value), value))
    return value


def types_of(hint: Any) -> list[Any]:
    """The types that an annotation allows besides None, without ranges and choices."""
    origin, arguments = _parse(hint)
    if origin is Annotated:
        return types_of(arguments[0])
    if origin is typing.Union:
        return [each for argument in arguments for each in types_of(argument) if each is not type(None)]
    return [type(arguments[0]) if origin is Literal else origin]


def describe(hint: Any) -> str:
    """An annotation in words: "an integer of at least 1", "a list of 2, each a number from 0 to 1"."""
    origin, arguments = _parse(hint)
    if origin is Annotated:
        return _describe(arguments[0], _bounds(hint))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is typing.Union:
        words = dict.fromkeys(describe(each) for each in arguments if _is_writable(each))
        return " or ".join(sorted(words, key=lambda each: each.startswith("a list")))  # whose elements come last
    return _describe(hint, {})


def _is_writable(hint: Any) -> bool:
    """Whether a config can hold such a value: not a tensor, which torch's optimizers also take."""
    origin, _ = _parse(hint)
    if origin in WORDS or origin in (Annotated, Literal) or not inspect.isclass(origin):
        return True
    return issubclass(origin, Mapping | Sequence)


def _describe(hint: Any, bounds: Mapping[str, Any]) -> str:
    """A type in words, with the bounds of a number, or of the length of a list."""
    origin, arguments = _parse(hint)
    if origin in WORDS:
        return f"{WORDS[origin]}{_describe_range(bounds)}"
    if not inspect.isclass(origin):
        return str(hint)
    if issubclass(origin, Mapping):
        return "a mapping"
    if not issubclass(origin, Sequence):
        return origin.__name__
    elements, fixed = _elements(origin, arguments)
    least = len(elements) if fixed else bounds.get("min_length")
    most = len(elements) if fixed else bounds.get("max_length")
    count = f" of {least}" if least and least == most else f" of at least {least}" if least else ""
    words = list(map(describe, elements))
    return f"a list{count}, each {words[0]}" if len(set(words)) == 1 else f"a list{count}: {', '.join(words)}"


def _describe_range(bounds: Mapping[str, Any]) -> str:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None and high is None:
        return ""
    if low is None:
        return f" of at most {high:,}" if "le" in bounds else f" below {high:,}"
    if high is None:
        return f" of at least {low:,}" if "ge" in bounds else f" above {low:,}"
    if "ge" in bounds and "le" in bounds:
        return f" from {low:,} to {high:,}"
    return f" in {'[' if 'ge' in bounds else '('}{low:,}, {high:,}{']' if 'le' in bounds else ')'}"


def _parse(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Origin and arguments of an annotation."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        arguments = typing.get_args(hint)
        return (float, ()) if arguments == (int, float) else (typing.Union, arguments)
    return origin, typing.get_args(hint)


def _bounds(hint: Any) -> dict[str, Any]:
    found = ((name, getattr(limit, name, None)) for limit in typing.get_args(hint)[1:] for name in LIMITS)
    return {name: bound for name, bound in found if bound is not None}


def _elements(origin: type, arguments: Sequence[Any]) -> tuple[list[Any], bool]:
    """Annotations of the elements of a list, and whether they fix its length."""
    if issubclass(origin, tuple) and arguments and Ellipsis not in arguments:
        return list(arguments), True
    return list(arguments[:1]) or [Any], False


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, Real):
        yield value


def _excess(number: Any, largest_integer: float = 2**63 - 1) -> str:
    """The bound that no number may exceed and that this one does."""
    if isinstance(number, Integral):
        return "" if abs(int(number)) <= largest_integer else ", within 64 bits"
    return "" if math.isfinite(number) else ", and finite"

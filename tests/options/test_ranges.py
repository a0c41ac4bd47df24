"""Ranges beside types: what fits, how it is worded, and that every numeric option of vqf refuses what it cannot use."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Interval, Le, Len, Lt
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqf.options import ranges
from vqf.options.ranges import Fraction, PositiveInt, Rate, Sides, describe, fits, mismatch

NAMED = {name: hint for name, hint in vars(ranges).items() if hasattr(hint, "__metadata__")}
HUGE = 10**21


@pytest.mark.parametrize("name", NAMED)
@given(data=st.data())
def test_what_hypothesis_draws_by_an_annotation_fits_it(name: str, data: st.DataObject) -> None:
    value = data.draw(st.from_type(NAMED[name]))
    assert fits(NAMED[name], value) == (mismatch(NAMED[name], value) is None)
    numbers = value if isinstance(value, Sequence) else [value]
    small = all(abs(each) < 2**63 if isinstance(each, int) else math.isfinite(each) for each in numbers)
    assert fits(NAMED[name], value) == small


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -1, np.int64(3), 2**63 - 1], [0.5, 1.0, True, None, "1", HUGE, math.nan]),
        (float, [0, -0.5, np.float32(0.5), HUGE], [True, None, "1", math.nan, math.inf, -math.inf, 10**400]),
        (PositiveInt, [1], [0, -1, 1.0, HUGE]),
        (PositiveInt | None, [1, None], [0]),
        (Rate, [0, 0.5], [1, -0.1, math.nan]),
        (Annotated[float, Interval(gt=0, le=math.inf)], [math.inf, 1], [0, math.nan, -math.inf]),
        (Annotated[int, Lt(3), "a note", Ge(1)], [1, 2], [0, 3]),
        (Sequence[PositiveInt], [[], (1, 2)], [[0], [1, None], 1, "1", [[1]]]),
        (Annotated[list[int], Len(1)], [[0]], [[]]),
        (tuple[Fraction, Fraction], [[0, 1]], [[], [0], [0, 0.5, 1], [0, math.nan]]),
        (tuple[int, float], [[1, 0.5]], [[0.5, 1], [1]]),
        (tuple[int, ...], [(), (1, 2)], [(0.5,)]),
        (Sides, [3, [3, 4]], [[3], 0.5, 0, [3, 0]]),
        (tuple[float | Tensor, float | Tensor], [(0.9, 0.99)], [[], [0], (math.inf, 0)]),
        (Mapping[str, PositiveInt], [{}, {"a": 1}], [{"a": 0}, [1]]),
        (Literal["a", 1], ["a", 1], ["b", 2]),
        (bool, [True], [1, "true"]),
        (str, ["a", Path("a")], [1, None]),
        (Any, [None, math.nan, [HUGE]], []),
    ],
    ids=lambda each: str(each)[:40],
)
def test_fits(hint: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not fits(hint, value)] == []
    assert [value for value in wrong if fits(hint, value)] == []


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (PositiveInt, "an integer of at least 1"),
        (Rate | None, "a number in [0, 1) or null"),
        (Annotated[int, Interval(ge=1, le=1000)], "an integer from 1 to 1,000"),
        (Annotated[float, Interval(gt=0)], "a number above 0"),
        (Annotated[float, Interval(gt=0, le=1)], "a number in (0, 1]"),
        (Annotated[float, Lt(1)], "a number below 1"),
        (Annotated[int, Le(1)], "an integer of at most 1"),
        (int | float, "a number"),
        (bool | int, "true or false or an integer"),
        (int | Sequence[int] | None, "an integer or null or a list, each an integer"),
        (Annotated[Sequence[PositiveInt], Len(1)], "a list of at least 1, each an integer of at least 1"),
        (tuple[Fraction, Fraction], "a list of 2, each a number from 0 to 1"),
        (tuple[float, float], "a list of 2, each a number"),
        (tuple[float, PositiveInt], "a list of 2: a number, an integer of at least 1"),
        (Literal["a", "b"] | None, "a or b or null"),
        (Mapping[str, int], "a mapping"),
        (float | Tensor, "a number"),
        (Sequence, "a list, each anything"),
    ],
    ids=str,
)
def test_words(hint: Any, words: str) -> None:
    assert describe(hint) == words


def test_a_message_says_what_every_number_must_be() -> None:
    assert mismatch(int, HUGE) == "must be an integer, within 64 bits"
    pair = tuple[Fraction, Fraction]
    assert mismatch(pair, [0, math.inf]) == "must be a list of 2, each a number from 0 to 1, and finite"
    assert mismatch(Rate, 2) == "must be a number in [0, 1)"

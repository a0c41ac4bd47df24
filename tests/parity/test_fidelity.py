"""docs/fidelity.md, and the measure that everything in it is made with."""

import pytest
import torch

from tests.parity.comparisons import Comparison, declared, difference
from tests.parity.fidelity import listed


def test_the_page_lists_the_comparisons_that_exist() -> None:
    """Not the digits, which another processor rounds otherwise; `python -m tests.parity` writes them."""
    assert listed() == {comparison: how for comparison, (_, how) in declared().items()}


def test_every_layer_has_its_own_scale() -> None:
    theirs = {"a.weight": torch.tensor([100.0]), "a.bias": torch.tensor([1.0]), "b.weight": torch.tensor([1e-6])}
    assert difference({**theirs, "a.bias": torch.tensor([1.1])}, theirs) == pytest.approx(1e-3)
    assert difference({**theirs, "b.weight": torch.tensor([2e-6])}, theirs) == pytest.approx(1.0)
    assert difference(theirs, theirs) == 0.0


def test_one_wrong_index_is_seen() -> None:
    indices = torch.arange(1000)
    assert difference(indices + (indices == 3), indices) > 1e-4


@pytest.mark.parametrize(
    "ours",
    [torch.ones(3), torch.ones(2, dtype=torch.float32), torch.full((2,), torch.nan, dtype=torch.float64)],
    ids=["shape", "dtype", "not a number"],
)
def test_what_cannot_be_compared_is_refused(ours: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        difference(ours, torch.ones(2, dtype=torch.float64))


def test_names_must_agree() -> None:
    with pytest.raises(AssertionError, match="only one side"):
        difference({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_a_comparison_is_named_once() -> None:
    assert Comparison("a", "b", "c", exact=True) == Comparison("a", "b", "c")

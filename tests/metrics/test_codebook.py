"""Codebook usage against a count by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqf.protocols import Reconstruction
from vqf.registry import build


def measure(vocab_size: int, *indices: torch.Tensor) -> dict[str, float]:
    metric = build("metric", {"name": "usage"}, vocab_size=vocab_size, device=torch.device("cpu"))
    for each in indices:
        blank = torch.zeros(len(each), 3, 4, 4)
        metric.update(Reconstruction(blank, blank, each))
    return metric.compute()


@given(
    st.integers(1, 40).flatmap(
        lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size - 1), min_size=1, max_size=60))
    )
)
def test_usage_equals_a_count_by_hand(case: tuple[int, list[int]]) -> None:
    size, indices = case
    shares = [count / len(indices) for count in Counter(indices).values()]
    values = measure(size, torch.tensor(indices).view(-1, 1, 1))
    assert values["usage"] == pytest.approx(len(shares) / size)
    assert values["dead_codes"] == size - len(shares)
    assert values["perplexity"] == pytest.approx(math.prod(share**-share for share in shares))


def test_even_use_has_the_perplexity_of_the_vocabulary() -> None:
    values = measure(64, torch.arange(64).view(4, 4, 4))
    assert values == pytest.approx({"usage": 1.0, "perplexity": 64.0, "dead_codes": 0.0})


def test_one_code_has_perplexity_one() -> None:
    assert measure(16, torch.full((3, 2, 2), 5)) == pytest.approx(
        {"usage": 1 / 16, "perplexity": 1.0, "dead_codes": 15.0}
    )


def test_batches_add_up_and_several_codebooks_are_counted_together() -> None:
    indices = torch.randint(0, 30, (6, 3, 3, 2), generator=torch.Generator().manual_seed(0))
    full = measure(30, indices)
    assert measure(30, indices[:1], indices[1:]) == full
    assert measure(30, indices.flatten(2)) == full


def test_before_the_first_image_every_code_is_dead() -> None:
    assert measure(8) == {"usage": 0.0, "perplexity": 1.0, "dead_codes": 8.0}

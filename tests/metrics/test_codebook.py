"""Codebook usage against a count by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.layouts import raster
from vqf.protocols import Reconstruction
from vqf.registry import build
from vqf.tokens.layout import TokenLayout


def measure(layout: TokenLayout, *tokens: torch.Tensor) -> dict[str, float]:
    metric = build("metric", {"name": "usage"}, layout=layout, device=torch.device("cpu"))
    for each in tokens:
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
    values = measure(raster((1, 1), size), torch.tensor(indices).view(-1, 1))
    assert values["usage"] == pytest.approx(len(shares) / size)
    assert values["dead_codes"] == size - len(shares)
    assert values["perplexity"] == pytest.approx(math.prod(share**-share for share in shares))


def test_even_use_has_the_perplexity_of_the_vocabulary() -> None:
    values = measure(raster((4, 4), 64), torch.arange(64).view(4, 16))
    assert values == pytest.approx({"usage": 1.0, "perplexity": 64.0, "dead_codes": 0.0})


def test_one_code_has_perplexity_one() -> None:
    assert measure(raster((2, 2), 16), torch.full((3, 4), 5)) == pytest.approx(
        {"usage": 1 / 16, "perplexity": 1.0, "dead_codes": 15.0}
    )


def test_batches_add_up() -> None:
    layout, tokens = raster((3, 3), 30), torch.randint(0, 30, (6, 9), generator=torch.Generator().manual_seed(0))
    assert measure(layout, tokens[:1], tokens[1:]) == measure(layout, tokens)


def test_several_codebooks_are_counted_apart() -> None:
    layout = TokenLayout(((3, 3),), (30, 10), 8)
    tokens = torch.randint(0, 10, (6, 9, 2), generator=torch.Generator().manual_seed(0))
    values = measure(layout, tokens[:1].flatten(1), tokens[1:].flatten(1))
    each = [measure(raster((3, 3), size), tokens[:, :, k]) for k, size in enumerate(layout.vocab_sizes)]
    for k, expected in enumerate(each):
        assert {key: values.pop(f"{key}/{k}") for key in expected} == expected
    assert values == pytest.approx({
        "usage": (each[0]["usage"] + each[1]["usage"]) / 2,
        "perplexity": math.sqrt(each[0]["perplexity"] * each[1]["perplexity"]),
        "dead_codes": each[0]["dead_codes"] + each[1]["dead_codes"],
    })  # fmt: skip


def test_a_huge_codebook_is_counted_as_a_small_one() -> None:
    tokens = torch.randint(0, 30, (6, 9), generator=torch.Generator().manual_seed(0))
    small = measure(raster((3, 3), 30), tokens)
    large = measure(raster((3, 3), 2**40), tokens[:2] << 33, tokens[2:] << 33)
    assert large["perplexity"] == pytest.approx(small["perplexity"])
    assert large["dead_codes"] == 2**40 - 30 + small["dead_codes"]
    assert large["usage"] == pytest.approx(small["usage"] * 30 / 2**40)


def test_before_the_first_image_every_code_is_dead() -> None:
    assert measure(raster((2, 2), 8)) == {"usage": 0.0, "perplexity": 1.0, "dead_codes": 8.0}

"""Indices of channels with few values against loops, in every shape and type."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqf.quantizers.product_codebook import DigitOrder, ProductCodebook
from vqf.tokens.layout import TokenLayout


def values_of(levels: list[int]) -> list[list[float]]:
    return [[10.0 * channel + digit for digit in range(count)] for channel, count in enumerate(levels)]


groups = st.lists(st.lists(st.integers(2, 7), min_size=1, max_size=4), min_size=1, max_size=4)
orders = st.sampled_from(["little", "big"])


def flatten(groups: list[list[int]]) -> list[int]:
    return [each for group in groups for each in group]


def make(levels: list[list[int]], order: DigitOrder) -> ProductCodebook:
    return ProductCodebook(values_of(flatten(levels)), [len(group) for group in levels], order)


def index_of(digits: list[int], levels: list[int], order: str) -> int:
    """Horner's rule from the highest digit down."""
    pairs = list(zip(digits, levels, strict=True))
    index = 0
    for digit, count in reversed(pairs) if order == "little" else pairs:
        index = index * count + digit
    return index


@given(groups, orders, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_indices_are_numbers_of_mixed_radix(
    levels: list[list[int]], order: DigitOrder, batch: int, height: int, width: int, random: Any
) -> None:
    codebook, flat = make(levels, order), flatten(levels)
    digits = torch.tensor([
        [[[random.randrange(count) for _ in range(width)] for _ in range(height)] for count in flat]
        for _ in range(batch)
    ])  # fmt: skip
    indices = codebook.encode(digits)
    assert codebook.vocab_sizes == tuple(map(math.prod, levels))
    assert indices.shape == ((batch, height, width) if len(levels) == 1 else (batch, height, width, len(levels)))
    for b, i, j in product(range(batch), range(height), range(width)):
        start = 0
        for k, group in enumerate(levels):
            mine = digits[b, start : start + len(group), i, j].tolist()
            index = indices[b, i, j] if len(levels) == 1 else indices[b, i, j, k]
            assert int(index) == index_of(mine, group, order)
            start += len(group)
    assert torch.equal(codebook.decode(indices), digits)
    expected = digits + 10.0 * torch.arange(len(flat))[:, None, None]
    assert torch.equal(codebook.lookup(indices), expected)
    for k in range(1, len(levels)):
        channels = sum(map(len, levels[:k]))
        first = codebook.lookup(indices[..., :k])
        assert torch.equal(first[:, :channels], expected[:, :channels]) and not first[:, channels:].any()


@given(groups, orders)
def test_every_code_has_one_index(levels: list[list[int]], order: DigitOrder) -> None:
    codebook = make([levels[0]], order)
    codes = codebook.lookup(torch.arange(codebook.vocab_size).view(1, 1, -1))[0, :, 0].T
    assert len(codes.unique(dim=0)) == codebook.vocab_size == math.prod(levels[0])


def test_61_bits_are_exact() -> None:
    codebook = ProductCodebook([[-1.0, 1.0]] * 61)
    digits = torch.randint(2, (2, 61, 3, 3))
    assert torch.equal(codebook.decode(codebook.encode(digits)), digits)
    assert codebook.encode(torch.ones_like(digits)).unique().tolist() == [2**61 - 1]
    with pytest.raises(ValueError, match=r"^a codebook of 2\^62 codes: an index holds less than 2\^62; give several"):
        ProductCodebook([[-1.0, 1.0]] * 62)
    assert ProductCodebook([[-1.0, 1.0]] * 62, [31, 31]).vocab_sizes == (2**31, 2**31)


@pytest.mark.parametrize("levels", [[2, 2, 2], [3, 2], [2, 5]])
@pytest.mark.parametrize("wrong", ["next", "negative"])
def test_an_index_out_of_range_is_no_code(levels: list[int], wrong: str) -> None:
    """A token that stands for "unknown" must not look like a code."""
    codebook = ProductCodebook(values_of(levels))
    index = torch.full((1, 1, 1), math.prod(levels) if wrong == "next" else -1)
    if levels == [3, 2] and wrong == "next":  # its highest digit is 2, for which the other channel has a value
        assert codebook.lookup(index).isnan().any()
        return
    with pytest.raises(RuntimeError, match="out of bounds"):
        codebook.lookup(index)


def test_it_holds_no_table_of_all_codes() -> None:
    codebook = ProductCodebook([[-1.0, 1.0]] * 36)
    assert sum(each.numel() for each in codebook.buffers()) < 300
    assert not codebook.state_dict(), "nothing to save"
    assert codebook.layout((4, 5), 8) == TokenLayout(((4, 5),), (2**36,), 8)


@pytest.mark.parametrize("factors", [[2, 2], [5, 0], [-1, 6], []])
def test_factors_that_do_not_fit_are_refused(factors: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^factors=\[.*must add up to the 5 channels; factors=\[2,3\] would$"):
        ProductCodebook([[0.0, 1.0]] * 5, factors)


def test_usage_of_several_codebooks() -> None:
    codebook = ProductCodebook([[0.0, 1.0]] * 3, [2, 1])
    indices = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0]]).view(1, 2, 2, 2)
    stats = codebook.usage_stats(indices, training=False)
    assert float(stats["perplexity"]) == pytest.approx((4 * 1) ** 0.5, rel=1e-5)
    assert float(stats["batch_usage"]) == pytest.approx((1 + 0.5) / 2)
    assert ProductCodebook([[0.0, 1.0]] * 36).usage_stats(torch.zeros(1, 1, 1), training=False) == {}

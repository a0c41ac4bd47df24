"""Prefixes, token by token."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqf.tokens.prefix import EMBEDDED, Prefix

DIM = 3


@st.composite
def prefixes(draw: st.DrawFn, rows: int | None = None, length: int | None = None) -> Prefix:
    """Of ids, of embeddings, or of both."""
    rows = draw(st.integers(1, 3)) if rows is None else rows
    length = draw(st.integers(1, 4)) if length is None else length
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(9, (rows, length), generator=generator)
    if draw(st.booleans()):
        return Prefix(ids)
    embedded = torch.rand(rows, length, generator=generator) < 0.5
    return Prefix(ids.masked_fill(embedded, EMBEDDED), torch.randn(rows, length, DIM, generator=generator))


def embeddings(prefix: Prefix) -> Tensor:
    """Those of a prefix, zeros by default."""
    return torch.zeros(*prefix.ids.shape, DIM) if prefix.embeddings is None else prefix.embeddings


@given(st.lists(prefixes(length=2), min_size=1, max_size=4))
@settings(deadline=None)
def test_cat_of_samples_keeps_every_sample(parts: list[Prefix]) -> None:
    whole, starts = Prefix.cat(parts), [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    assert len(whole) == starts[-1]
    for part, (start, end) in zip(parts, pairwise(starts), strict=True):
        assert torch.equal(whole[start:end].ids, part.ids)
        assert torch.equal(embeddings(whole[start:end]), embeddings(part))
    assert (whole.embeddings is None) == all(part.embeddings is None for part in parts)


@given(st.lists(prefixes(rows=2), min_size=1, max_size=4))
@settings(deadline=None)
def test_cat_of_tokens_keeps_every_token(parts: list[Prefix]) -> None:
    whole, n = Prefix.cat(parts, dim=1), 0
    for part in parts:
        for m in range(part.ids.shape[1]):
            assert torch.equal(whole.ids[:, n], part.ids[:, m])
            assert torch.equal(embeddings(whole)[:, n], embeddings(part)[:, m])
            n += 1
    assert whole.ids.shape == (2, n)


def test_cat_refuses_embeddings_of_several_widths() -> None:
    ids = torch.full((1, 1), EMBEDDED)
    with pytest.raises(ValueError):
        Prefix.cat([Prefix(ids, torch.zeros(1, 1, 2)), Prefix(ids, torch.zeros(1, 1, 3))])


@given(prefixes())
@settings(deadline=None)
def test_equals_reads_ids_and_embeddings(prefix: Prefix) -> None:
    copy = prefix.map(torch.clone)
    assert prefix.equals(copy) and copy.equals(prefix)
    assert not prefix.equals(Prefix(prefix.ids + 1, prefix.embeddings))
    if prefix.embeddings is not None:
        assert not prefix.equals(Prefix(prefix.ids, prefix.embeddings + 1))
    other = Prefix(prefix.ids, None if prefix.embeddings is not None else torch.zeros(*prefix.ids.shape, DIM))
    assert not prefix.equals(other) and not other.equals(prefix)


@given(prefixes(), st.integers(0, 2**32))
@settings(deadline=None)
def test_map_and_rows_act_on_both_parts(prefix: Prefix, seed: int) -> None:
    order = torch.randperm(len(prefix), generator=torch.Generator().manual_seed(seed))
    for chosen in (prefix[order], prefix.map(lambda each: each[order])):
        assert torch.equal(chosen.ids, prefix.ids[order])
        assert torch.equal(embeddings(chosen), embeddings(prefix)[order])
        assert (chosen.embeddings is None) == (prefix.embeddings is None)
    assert prefix.device == prefix.ids.device


def test_ids_alone_are_a_prefix() -> None:
    ids = torch.arange(6).view(2, 3)
    prefix = Prefix.of(ids)
    assert prefix.ids is ids and prefix.embeddings is None
    assert Prefix.of(prefix) is prefix

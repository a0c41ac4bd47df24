"""Token layouts against loops over scales, rows, columns and codebooks."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqf.batch import Size
from vqf.tokens.layout import TokenLayout

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
vocabularies = st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple)
strides = st.none() | st.integers(1, 32)


def layouts(max_scales: int = 4, strides: st.SearchStrategy[int | None] = strides) -> st.SearchStrategy[TokenLayout]:
    scales = st.lists(sizes, min_size=1, max_size=max_scales).map(tuple)
    return st.builds(TokenLayout, scales, vocabularies, strides)


rasters = layouts(max_scales=1, strides=st.integers(1, 32))


def positions(layout: TokenLayout) -> list[tuple[int, int, int, int]]:
    """Scale, row, column and codebook of each token, one after the other."""
    return [
        (scale, row, column, codebook)
        for scale, (height, width) in enumerate(layout.scales)
        for row in range(height)
        for column in range(width)
        for codebook in range(len(layout.vocab_sizes))
    ]


@given(layouts())
@settings(deadline=None)
def test_coordinates_are_those_of_a_loop(layout: TokenLayout) -> None:
    expected = positions(layout)
    coordinates = layout.coordinates()
    assert coordinates.dtype == torch.int64 and coordinates.shape == (layout.length, 4)
    assert list(map(tuple, coordinates.tolist())) == expected
    assert layout.length == len(expected)


@given(layouts())
@settings(deadline=None)
def test_groups_count_the_tokens_of_each_scale(layout: TokenLayout) -> None:
    counts = [sum(position[0] == scale for position in positions(layout)) for scale in range(len(layout.scales))]
    assert layout.groups() == tuple(counts)


@given(layouts(), st.integers(1, 3))
@settings(deadline=None)
def test_unflatten_and_flatten_are_inverse(layout: TokenLayout, batch: int) -> None:
    tokens = torch.arange(batch * layout.length).view(batch, layout.length)
    indices = layout.unflatten(tokens)
    assert torch.equal(layout.flatten(indices), tokens)
    if len(layout.scales) > 1:
        assert torch.equal(indices, tokens)
        return
    codebooks = [] if layout.codebooks == 1 else [layout.codebooks]
    assert list(indices.shape) == [batch, *layout.scales[0], *codebooks]
    for n, (_, row, column, codebook) in enumerate(positions(layout)):
        place = (slice(None), row, column, codebook)[: indices.ndim]
        assert torch.equal(indices[place], tokens[:, n])


@given(layouts(), st.integers(-3, 3).filter(bool))
@settings(deadline=None)
def test_a_wrong_number_of_tokens_is_refused(layout: TokenLayout, more: int) -> None:
    length = max(layout.length + more, 0)
    with pytest.raises(ValueError, match=rf"tokens must be \(B, {layout.length}\), not \(2, {length}\)"):
        layout.unflatten(torch.zeros(2, length, dtype=torch.int64))


@given(layouts())
@settings(deadline=None)
def test_by_codebook_has_a_column_for_each(layout: TokenLayout) -> None:
    tokens = torch.arange(2 * layout.length).view(2, -1)
    columns = layout.by_codebook(tokens)
    for k in range(layout.codebooks):
        mine = [n for n, position in enumerate(positions(layout)) if position[3] == k]
        assert torch.equal(columns[..., k], tokens[:, mine])


@given(rasters)
@settings(deadline=None)
def test_cells_to_tokens_repeats_the_value_of_a_cell(layout: TokenLayout) -> None:
    height, width = layout.scales[0]
    values = torch.arange(2 * height * width).view(2, height, width)
    tokens = layout.cells_to_tokens(values)
    assert tokens.shape == (2, layout.length)
    for n, (_, row, column, _) in enumerate(positions(layout)):
        assert torch.equal(tokens[:, n], values[:, row, column])


@given(layouts())
@settings(deadline=None)
def test_vocabularies(layout: TokenLayout) -> None:
    sizes = layout.vocab_sizes
    assert layout.codebooks == len(sizes) and layout.vocab_size == max(sizes)
    numbered = [layout.vocab_offsets[k] + code for k, size in enumerate(sizes) for code in range(size)]
    assert numbered == list(range(sum(sizes))), "all codes of all codebooks have different numbers"
    nats = [math.log(sizes[codebook]) for *_, codebook in positions(layout)]
    assert layout.uniform_nats == pytest.approx(math.fsum(nats) / len(nats))
    assert layout.bits == pytest.approx(sum(math.log2(sizes[codebook]) for *_, codebook in positions(layout)))


@given(layouts(max_scales=1), sizes)
@settings(deadline=None)
def test_resized_changes_the_grid_alone(layout: TokenLayout, grid: Size) -> None:
    resized = layout.resized(grid)
    assert resized.scales == (grid,)
    assert (resized.vocab_sizes, resized.stride) == (layout.vocab_sizes, layout.stride)
    assert resized.resized(layout.scales[0]) == layout


@given(layouts())
def test_a_grid_and_a_raster_need_places(layout: TokenLayout) -> None:
    unplaced = layout.stride is None
    assert layout.grid == (None if unplaced else layout.scales[-1])
    assert layout.is_raster == (len(layout.scales) == 1 and not unplaced)


def same_tokens(first: TokenLayout, second: TokenLayout) -> bool:
    """Whether the tokens of `first` mean what the first ones of `second` do, position by position."""
    if (first.vocab_sizes, first.stride) != (second.vocab_sizes, second.stride):
        return False
    return positions(first) == positions(second)[: first.length]


@given(rasters, sizes)
@settings(deadline=None)
def test_a_raster_of_fewer_rows_starts_another(layout: TokenLayout, grid: Size) -> None:
    other = layout.resized(grid)
    # Of one row alone, the first columns come first too; but the prior was trained on rows of another width.
    same_width = grid[1] == layout.scales[0][1]
    assert layout.starts(other) == (same_tokens(layout, other) and same_width)
    assert layout.starts(other) == (same_width and layout.scales[0][0] <= grid[0])


@given(layouts(), layouts())
@settings(deadline=None)
def test_what_starts_another_has_the_same_first_tokens(first: TokenLayout, second: TokenLayout) -> None:
    assert first.starts(first)
    if first.starts(second):
        assert same_tokens(first, second)


@given(rasters)
@settings(deadline=None)
def test_other_vocabularies_scales_and_places_start_nothing(layout: TokenLayout) -> None:
    (height, width), taller = layout.scales[0], layout.resized((layout.scales[0][0] + 1, layout.scales[0][1]))
    assert layout.starts(taller) and not taller.starts(layout)
    for other in (
        replace(taller, vocab_sizes=(*layout.vocab_sizes[1:], layout.vocab_sizes[0] + 1)),
        replace(taller, stride=None),
        replace(taller, scales=((height, width), (height + 1, width))),
    ):
        assert not layout.starts(other) and not other.starts(layout)
    unplaced = replace(layout, stride=None)
    assert unplaced.starts(unplaced) and not unplaced.starts(replace(taller, stride=None))


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (TokenLayout(((16, 16),), (16384,), 16), "16 x 16"),
        (TokenLayout(((8, 8),), (16384,) * 4, 32), "(8 x 8) x 4"),
        (TokenLayout(((1, 1), (2, 3)), (4096,), 16), "1 x 1 + 2 x 3"),
    ],
)
def test_it_is_written_as_its_grids(layout: TokenLayout, text: str) -> None:
    assert str(layout) == text

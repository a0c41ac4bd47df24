"""Sliding windows: every way to go through a grid against the loop of the paper's notebook, one token at a time."""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.registry import RegistryError, build
from vqf.transformers.gpt import GPT
from vqf.transformers.sampling import draw, uniforms
from vqf.transformers.sliding import crop, waves, window_start

V, P, SEED = 13, 7, 3
WAYS = [
    dict(zip(("prefix_only", "cache", "wavefront"), each, strict=True)) for each in itertools.product((0, 1), repeat=3)
]
CASES = [  # grid, window
    ((4, 4), (4, 4)),
    ((7, 9), (4, 4)),
    ((9, 4), (4, 4)),
    ((4, 11), (4, 4)),
    ((5, 6), (4, 4)),
    ((6, 13), (2, 6)),
    ((9, 7), (6, 2)),
    ((8, 10), (3, 5)),
    ((3, 10), (4, 4)),
    ((5, 6), (1, 3)),
    ((3, 5), (2, 1)),
]


@lru_cache
def gpt(length: int, prefix_length: int = 1) -> GPT:
    torch.manual_seed(0)
    model = GPT(V, length, P, prefix_length, layers=2, heads=2, dim=16).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    nn.init.normal_(model.prefix_embedding.weight, std=4.0)  # a condition that every token follows
    return model


def notebook_local(i: int, window: int, length: int) -> int:
    """A token's place in its window as the paper's notebook has it, for even windows."""
    if i <= window // 2:
        return i
    if length - i < window // 2:
        return window - (length - i)
    return window // 2


def one_by_one(
    prior: Any, condition: Callable[[int, int, int], Tensor], batch: int, grid: tuple[int, int], window: tuple[int, int]
) -> Tensor:
    """For each sample, row and column: the whole window through the whole prior, of which one row of logits counts."""
    (H, W), (h, w) = grid, (min(window[0], grid[0]), window[1])
    out = []
    for b in range(batch):
        numbers = uniforms(SEED, b, H * W).reshape(H, W)
        drawn = torch.randint(V, grid)  # what is not drawn yet may be anything
        for i in range(H):
            local_i = notebook_local(i, h, H) if h % 2 == 0 else i - min(max(i - h // 2, 0), H - h)
            for j in range(W):
                local_j = notebook_local(j, w, W) if w % 2 == 0 else j - min(max(j - w // 2, 0), W - w)
                top, left = i - local_i, j - local_j
                patch = drawn[top : top + h, left : left + w].reshape(1, -1)
                logits = prior(patch, condition(b, top, left)).reshape(1, h, w, -1)[:, local_i, local_j]
                drawn[i, j] = draw(logits.float(), numbers[i, j][None])[0]
        out.append(drawn.flatten())
    return torch.stack(out)


@lru_cache
def expected(grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    prefix = torch.tensor([[0], [3], [5]])
    return one_by_one(gpt(window[0] * window[1]), lambda b, top, left: prefix[b : b + 1], 3, grid, window)


def sampler(window: tuple[int, int], **options: Any) -> Any:
    return build("sampler", {"name": "sliding_window", "window": list(window), **options})


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_every_way_gives_the_tokens_of_the_plain_loop(grid: tuple, window: tuple, ways: dict) -> None:
    ways = {key: bool(value) for key, value in ways.items()}
    prefix = torch.tensor([[0], [3], [5]])
    tokens = sampler(window, **ways)(gpt(window[0] * window[1]), prefix, grid, seed=SEED)
    assert torch.equal(tokens, expected(grid, window))


class Slow:
    """The GPT with less to offer: no way to be fed, or only token by token."""

    vocab_size = V

    def __init__(self, model: GPT, fed: bool) -> None:
        self.model = model
        if fed:
            self.begin = lambda prefix: model.begin(prefix)
            self.advance = model.advance

    def __call__(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        return self.model(tokens, prefix)

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        return self.model.loss(tokens, prefix)


@pytest.mark.parametrize("fed", [True, False])
def test_any_prior_will_do(fed: bool) -> None:
    tokens = sampler((4, 4))(Slow(gpt(16), fed), torch.tensor([[0], [3], [5]]), (7, 9), seed=SEED)
    assert torch.equal(tokens, expected((7, 9), (4, 4)))


@pytest.mark.parametrize("ways", [WAYS[0], WAYS[-1]], ids=str)
@pytest.mark.parametrize("callable_prefix", [False, True])
def test_a_spatial_condition_is_cropped_with_the_window(ways: dict, callable_prefix: bool) -> None:
    grid, window = (6, 9), (3, 4)
    ways = {key: bool(value) for key, value in ways.items()}
    layout = torch.randint(P, (2, *grid), generator=torch.Generator().manual_seed(4))

    def condition(b: int, top: int, left: int) -> Tensor:
        return layout[b : b + 1, top : top + 3, left : left + 4].reshape(1, 12)

    model = gpt(12, 12)
    plain = one_by_one(model, condition, 2, grid, window)

    def by_start(at: tuple[int, int], size: tuple[int, int]) -> Tensor:
        assert size == window
        return torch.cat([condition(b, *at) for b in range(2)])

    prefix: Any = by_start if callable_prefix else layout
    assert torch.equal(sampler(window, **ways)(model, prefix, grid, seed=SEED), plain)
    other = layout.clone()
    other[:, -1, -1] = (other[:, -1, -1] + 1) % P
    changed = (sampler(window, **ways)(model, other, grid, seed=SEED) != plain).reshape(2, *grid)
    assert not changed[:, :4].any()  # rows whose windows end above the last


def test_one_window_over_the_whole_grid_is_the_autoregressive_sampler() -> None:
    prefix = torch.tensor([[0], [3], [5]])
    plain = build("sampler", {"name": "autoregressive", "top_k": 6, "min_p": 0.02})(gpt(12), prefix, (3, 4), seed=9)
    window = build("sampler", {"name": "sliding_window", "top_k": 6, "min_p": 0.02})
    assert torch.equal(window(gpt(12), prefix, (3, 4), seed=9), plain)
    assert torch.equal(window(gpt(20), prefix, (3, 4), seed=9, window=(4, 4)), window(gpt(20), prefix, (3, 4), seed=9))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_is_the_same_every_way(schedule: str) -> None:
    prefix, null = torch.tensor([[0], [3]]), torch.tensor([[6], [6]])
    options = {"guidance": 2.5, "guidance_schedule": schedule}
    drawn = [
        sampler((4, 4), **{key: bool(value) for key, value in ways.items()}, **options)(
            gpt(16), prefix, (6, 9), seed=SEED, null_prefix=null
        )
        for ways in WAYS
    ]
    assert all(torch.equal(each, drawn[0]) for each in drawn)
    assert not torch.equal(drawn[0], sampler((4, 4))(gpt(16), prefix, (6, 9), seed=SEED))
    whole = build("sampler", {"name": "autoregressive", **options})(gpt(16), prefix, (4, 4), seed=1, null_prefix=null)
    assert torch.equal(sampler((4, 4), **options)(gpt(16), prefix, (4, 4), seed=1, null_prefix=null), whole)
    with pytest.raises(UserError, match=r"model\.conditioner\.label\.drop"):
        sampler((4, 4), **options)(gpt(16), prefix, (6, 9), seed=SEED)


def test_known_tokens_stay_and_the_rest_follows_from_them() -> None:
    prefix, whole = torch.tensor([[0], [3], [5]]), expected((7, 9), (4, 4))
    hidden = torch.rand(whole.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    again = sampler((4, 4))(gpt(16), prefix, (7, 9), seed=SEED, known=whole.masked_fill(hidden, -1))
    assert torch.equal(again, whole)
    other = (whole + 1) % V
    kept = sampler((4, 4))(gpt(16), prefix, (7, 9), seed=SEED, known=other.masked_fill(hidden, -1))
    assert torch.equal(kept[~hidden], other[~hidden])


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 30), st.data())
def test_windows_start_where_the_notebook_starts_them(half: int, more: int, data: st.DataObject) -> None:
    window, length = 2 * half, 2 * half + more
    i = data.draw(st.integers(0, length - 1))
    assert window_start(i, window, length) == i - notebook_local(i, window, length)


@settings(deadline=None)
@given(st.integers(1, 25), st.integers(0, 40), st.data())
def test_a_window_holds_its_token_inside_of_the_grid(window: int, more: int, data: st.DataObject) -> None:
    length = window + more
    i = data.draw(st.integers(0, length - 1))
    at = window_start(i, window, length)
    assert 0 <= at <= i < at + window <= length
    assert at == i - window // 2 or (at == 0 and i < window // 2) or (at == length - window and i > at + window // 2)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 12))


@settings(deadline=None)
@given(sizes)
def test_a_wave_waits_for_all_that_its_windows_show(size: tuple[int, int, int, int]) -> None:
    h, w, taller, wider = size
    H, W = h + taller, w + wider
    drawn: set[tuple[int, int]] = set()
    steps = 0
    for cells in waves((H, W), w):
        for i, j in cells:
            top, left = window_start(i, h, H), window_start(j, w, W)
            window = itertools.product(range(top, top + h), range(left, left + w))
            assert {cell for cell in window if cell < (i, j)} <= drawn
        assert cells and not drawn & set(cells)
        drawn |= set(cells)
        steps += 1
    assert drawn == set(itertools.product(range(H), range(W)))
    assert steps == W + w * (H - 1)


@pytest.mark.parametrize(("grid", "steps"), [((42, 64), 720), ((24, 160), 528), ((64, 64), 1072), ((32, 32), 528)])
def test_steps_of_known_grids(grid: tuple[int, int], steps: int) -> None:
    assert len(list(waves(grid, 16))) == steps


def test_the_work_is_what_the_options_say() -> None:
    """Token positions that run through the blocks, and passes."""
    model, prefix, grid = gpt(16), torch.tensor([[0]]), (9, 12)
    counted: list[int] = []
    hook = model.blocks[0].register_forward_hook(lambda module, inputs, output: counted.append(output[..., 0].numel()))
    work = {}
    for ways in WAYS:
        counted.clear()
        sampler((4, 4), **{key: bool(value) for key, value in ways.items()})(model, prefix, grid, seed=0)
        work[tuple(ways.values())] = (len(counted), sum(counted))
    hook.remove()
    assert work[0, 0, 0] == (108, 108 * 16)
    starts = [(i - window_start(i, 4, 9)) * 4 + j - window_start(j, 4, 12) for i in range(9) for j in range(12)]
    assert work[1, 0, 0] == (108, sum(1 + n for n in starts))
    assert work[0, 0, 1] == (len(list(waves(grid, 4))), 108 * 16)
    # Of the five columns at borders, a row reads a whole prefix twice, and one token in the other three.
    first = [starts[12 * i + j] + 1 for i in range(9) for j in (0, 10)]
    moving = [starts[12 * i + j] + 1 for i in range(9) for j in range(3, 10)]
    assert work[1, 1, 0] == (108, sum(first) + sum(moving) + 3 * 9)
    assert work[1, 1, 1][1] == work[1, 1, 0][1]
    assert work[1, 1, 1][0] < work[1, 1, 0][0]


def test_a_grid_as_wide_as_the_window_reads_every_prefix_once() -> None:
    model, counted = gpt(16), []
    hook = model.blocks[0].register_forward_hook(lambda module, inputs, output: counted.append(output.shape[1]))
    sampler((4, 4))(model, torch.tensor([[0]]), (7, 4), seed=0)
    hook.remove()
    # Rows 0 to 2 share a window, and so do rows 5 and 6 with the one that comes before them at its end.
    assert [n for n in counted if n > 1] == [9, 9, 9]


def test_crop_reads_a_grid_row_by_row() -> None:
    layout = torch.arange(24).reshape(1, 4, 6)
    assert crop(layout, (1, 2), (2, 3)).tolist() == [[8, 9, 10, 14, 15, 16]]


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    prefix = torch.tensor([[0]])
    with pytest.raises(UserError, match="narrower than the window of 4 x 4; draw at least 4 columns"):
        sampler((4, 4))(gpt(16), prefix, (8, 3), seed=0)
    with pytest.raises(UserError, match=r"sampler\.window=\[4,5\]: it has 20 tokens, the prior models 16"):
        sampler((4, 5))(gpt(16), prefix, (8, 8), seed=0)
    with pytest.raises(RegistryError, match="window must be at least 1 high and wide"):
        sampler((0, 5))

"""Sliding windows: every combination of shortcuts against the loop of the paper's notebook, one token at a time."""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.protocols import Causal, RaggedDecoding
from vqf.registry import RegistryError, build
from vqf.tokens.prefix import Prefix, PrefixSpec
from vqf.transformers.gpt import GPT
from vqf.transformers.samplers.filtering import sample_from_logits, sample_noise
from vqf.transformers.samplers.window_logits import crop_prefix
from vqf.transformers.samplers.window_schedule import make_schedule, raster_order, wavefront_order, window_start

V, P, SEED = 13, 7, 3
WAYS = [dict(zip(("cache", "wavefront"), each, strict=True)) for each in itertools.product((0, 1), repeat=2)]
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
def prior(name: str, window: tuple[int, int], mapped: bool = False) -> Any:
    """A prior with a prefix of one token, or of one for every position of the window."""
    torch.manual_seed(0)
    positions = [(float(i), float(j)) for i in range(window[0]) for j in range(window[1])] if mapped else [None]
    options = {"unmasked": {"name": "gpt", "unmasked_prefix": True}, "llama": {"name": "llama", "multiple_of": 8}}
    node = {"name": name, "layers": 2, "heads": 2, "dim": 16, **options.get(name, {})}
    prefix = PrefixSpec(P, len(positions), positions)
    model = build("prior", node, layout=raster(window, V), prefix=prefix).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    nn.init.normal_(model.prefix_embedding.weight, std=4.0)  # a condition that affects every token
    return model


def gpt(length: int) -> GPT:
    return prior("gpt", (1, length))


def notebook_local(i: int, window: int, length: int) -> int:
    """A token's position in its window as in the paper's notebook, for even windows."""
    if i <= window // 2:
        return i
    if length - i < window // 2:
        return window - (length - i)
    return window // 2


def one_by_one(
    prior: Any, condition: Callable[[int, int, int], Tensor], batch: int, grid: tuple[int, int], window: tuple[int, int]
) -> Tensor:
    """For each sample, row and column: the full window through the prior, and one row of its logits."""
    (H, W), (h, w) = grid, (min(window[0], grid[0]), window[1])
    out = []
    for b in range(batch):
        noise = sample_noise(SEED, b, H * W).reshape(H, W)
        tokens = torch.randint(V, grid)  # tokens that are not sampled yet are arbitrary
        for i in range(H):
            local_i = notebook_local(i, h, H) if h % 2 == 0 else i - min(max(i - h // 2, 0), H - h)
            for j in range(W):
                local_j = notebook_local(j, w, W) if w % 2 == 0 else j - min(max(j - w // 2, 0), W - w)
                top, left = i - local_i, j - local_j
                patch = tokens[top : top + h, left : left + w].reshape(1, -1)
                logits = prior(patch, condition(b, top, left)).reshape(1, h, w, -1)[:, local_i, local_j]
                tokens[i, j] = sample_from_logits(logits.float(), noise[i, j][None])[0]
        out.append(tokens.flatten())
    return torch.stack(out)


@lru_cache
def expected(grid: tuple[int, int], window: tuple[int, int], name: str = "gpt") -> Tensor:
    prefix = torch.tensor([[0], [3], [5]])
    return one_by_one(prior(name, window), lambda b, top, left: prefix[b : b + 1], 3, grid, window)


def sampler(window: tuple[int, int], **options: Any) -> Any:
    options = {key: bool(value) if key in WAYS[0] else value for key, value in options.items()}
    return build("sampler", {"name": "sliding_window", "window": list(window), **options})


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize(("grid", "window"), CASES)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_every_way_gives_the_tokens_of_the_plain_loop(name: str, grid: tuple, window: tuple, ways: dict) -> None:
    prefix = torch.tensor([[0], [3], [5]])
    tokens = sampler(window, **ways)(prior(name, window), prefix, raster(grid, V), seed=SEED)
    assert torch.equal(tokens, expected(grid, window, name))


@pytest.mark.parametrize("max_cached", [0, 1, 3, 7])
@pytest.mark.parametrize("wavefront", [False, True])
def test_windows_that_do_not_fit_into_the_cache_are_read_again(max_cached: int, wavefront: bool) -> None:
    model, prefix = prior("gpt", (4, 4)), torch.tensor([[0], [3], [5]])
    room = (max_cached + 0.5) * 3 * model.sequence_bytes / 1e9
    small_cache = sampler((4, 4), cache_gb=room, wavefront=wavefront)
    assert torch.equal(small_cache(model, prefix, raster((7, 9), V), seed=SEED), expected((7, 9), (4, 4)))


class Slow:
    """The GPT without a cache, or with that of `Causal` only."""

    def __init__(self, model: GPT, fed: bool) -> None:
        self.model, self.layout, self.groups = model, model.layout, model.groups
        if fed:
            self.prefill = lambda prefix: model.prefill(prefix)
            self.decode = model.decode

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        return self.model(tokens, prefix)

    def loss(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        return self.model.loss(tokens, prefix)


@pytest.mark.parametrize("fed", [True, False])
def test_any_prior_will_do(fed: bool) -> None:
    slow = Slow(gpt(16), fed)
    assert isinstance(slow, Causal) == fed and not isinstance(slow, RaggedDecoding)
    tokens = sampler((4, 4))(slow, torch.tensor([[0], [3], [5]]), raster((7, 9), V), seed=SEED)
    assert torch.equal(tokens, expected((7, 9), (4, 4)))


MAP = torch.randint(P, (2, 6, 9), generator=torch.Generator().manual_seed(4))


def condition(b: int, top: int, left: int) -> Tensor:
    return MAP[b : b + 1, top : top + 3, left : left + 4].reshape(1, 12)


@lru_cache
def expected_of_a_map(name: str) -> Tensor:
    return one_by_one(prior(name, (3, 4), mapped=True), condition, 2, (6, 9), (3, 4))


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize("callable_prefix", [False, True])
@pytest.mark.parametrize("name", ["gpt", "unmasked", "llama"])
def test_a_spatial_condition_is_cropped_with_the_window(name: str, ways: dict, callable_prefix: bool) -> None:
    grid, window = (6, 9), (3, 4)
    model, plain = prior(name, window, mapped=True), expected_of_a_map(name)

    def by_start(at: tuple[int, int], size: tuple[int, int]) -> Prefix:
        assert size == window
        return Prefix(torch.cat([condition(b, *at) for b in range(2)]))

    prefix: Any = by_start if callable_prefix else MAP
    assert torch.equal(sampler(window, **ways)(model, prefix, raster(grid, V), seed=SEED), plain)
    other = MAP.clone()
    other[:, -1, -1] = (other[:, -1, -1] + 1) % P
    changed = (sampler(window, **ways)(model, other, raster(grid, V), seed=SEED) != plain).reshape(2, *grid)
    assert not changed[:, :4].any()  # rows whose windows end above the last


def test_one_window_over_the_whole_grid_is_the_autoregressive_sampler() -> None:
    prefix = torch.tensor([[0], [3], [5]])
    layout, filters = raster((3, 4), V), {"top_k": 6, "min_p": 0.02}
    autoregressive = build("sampler", {"name": "autoregressive", **filters})
    window = build("sampler", {"name": "sliding_window", **filters})
    for model in (prior("gpt", (3, 4)), prior("gpt", (5, 4))):  # a window has no more rows than the grid
        plain = autoregressive(model, prefix, layout, seed=9)
        assert torch.equal(window(model, prefix, layout, seed=9), plain)
    assert torch.equal(sampler((4, 4), **filters)(model, prefix, layout, seed=9), plain)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_is_the_same_every_way(schedule: str) -> None:
    prefix, null = torch.tensor([[0], [3]]), torch.tensor([[6], [6]])
    options = {"guidance": 2.5, "guidance_schedule": schedule}
    results = [
        sampler((4, 4), **ways, **options)(gpt(16), prefix, raster((6, 9), V), seed=SEED, null_prefix=null)
        for ways in WAYS
    ]
    assert all(torch.equal(each, results[0]) for each in results)
    assert not torch.equal(results[0], sampler((4, 4))(gpt(16), prefix, raster((6, 9), V), seed=SEED))
    autoregressive = build("sampler", {"name": "autoregressive", **options})(
        gpt(16), prefix, raster((4, 4), V), seed=1, null_prefix=null
    )
    assert torch.equal(
        sampler((4, 4), **options)(gpt(16), prefix, raster((4, 4), V), seed=1, null_prefix=null), autoregressive
    )
    with pytest.raises(UserError, match=r"model\.conditioner\.label\.dropout"):
        sampler((4, 4), **options)(gpt(16), prefix, raster((6, 9), V), seed=SEED)


def test_known_tokens_stay_and_the_rest_follows_from_them() -> None:
    prefix, tokens = torch.tensor([[0], [3], [5]]), expected((7, 9), (4, 4))
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    again = sampler((4, 4))(gpt(16), prefix, raster((7, 9), V), seed=SEED, known=tokens.masked_fill(hidden, -1))
    assert torch.equal(again, tokens)
    other = (tokens + 1) % V
    kept = sampler((4, 4))(gpt(16), prefix, raster((7, 9), V), seed=SEED, known=other.masked_fill(hidden, -1))
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
def test_a_wavefront_step_needs_only_tokens_of_earlier_steps(size: tuple[int, int, int, int]) -> None:
    h, w, taller, wider = size
    H, W = h + taller, w + wider
    sampled: set[tuple[int, int]] = set()
    steps = 0
    for cells in wavefront_order((H, W), w):
        for i, j in cells:
            top, left = window_start(i, h, H), window_start(j, w, W)
            window = itertools.product(range(top, top + h), range(left, left + w))
            assert {cell for cell in window if cell < (i, j)} <= sampled
        assert cells and not sampled & set(cells)
        sampled |= set(cells)
        steps += 1
    assert sampled == set(itertools.product(range(H), range(W)))
    assert steps == W + w * (H - 1)


@pytest.mark.parametrize(("grid", "steps"), [((42, 64), 720), ((24, 160), 528), ((64, 64), 1072), ((32, 32), 528)])
def test_steps_of_known_grids(grid: tuple[int, int], steps: int) -> None:
    assert len(list(wavefront_order(grid, 16))) == steps


def passes(model: GPT, work: Callable[[], object]) -> list[int]:
    """The number of positions that pass through the blocks, by pass."""
    counted: list[int] = []
    hook = model.blocks[0].register_forward_hook(lambda module, inputs, output: counted.append(output[..., 0].numel()))
    work()
    hook.remove()
    return counted


def windows_of(grid: tuple[int, int], window: tuple[int, int]) -> dict[tuple[int, int], list[int]]:
    """By start of a window: the number of positions of [start token; tokens] that each of its tokens needs."""
    counts: dict[tuple[int, int], list[int]] = {}
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        top, left = window_start(i, window[0], grid[0]), window_start(j, window[1], grid[1])
        counts.setdefault((top, left), []).append(1 + (i - top) * window[1] + j - left)
    return counts


@pytest.mark.parametrize("grid", [(9, 12), (7, 4), (4, 11)])
def test_the_work_is_what_the_options_say(grid: tuple[int, int]) -> None:
    model, prefix = gpt(16), torch.tensor([[0]])
    work = {}
    for ways in WAYS:
        window_sampler = sampler((4, 4), **ways)
        work[tuple(ways.values())] = passes(
            model, lambda window_sampler=window_sampler: window_sampler(model, prefix, raster(grid, V), seed=0)
        )
    cells, needed = grid[0] * grid[1], windows_of(grid, (4, 4)).values()
    assert len(work[0, 0]) == len(work[1, 0]) == cells
    assert len(work[0, 1]) == len(work[1, 1]) == grid[1] + 4 * (grid[0] - 1)
    assert sum(work[0, 0]) == sum(work[0, 1]) == sum(sum(each) for each in needed)
    once = sum(max(each) for each in needed)  # every position of every window
    assert sum(work[1, 0]) == sum(work[1, 1]) == once


@pytest.mark.parametrize(("grid", "steps"), [((42, 64), 720), ((64, 64), 1072)])
def test_there_is_one_pass_of_the_prior_a_step(grid: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    model = GPT(raster((16, 16), V), PrefixSpec(P, 1), layers=1, heads=1, dim=4).eval()
    assert len(passes(model, lambda: sampler((16, 16))(model, torch.tensor([[0]]), raster(grid, V), seed=0))) == steps


@pytest.mark.parametrize("wavefront", [False, True])
@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_a_schedule_caches_no_more_than_it_may_and_reads_in_order(keep: int, wavefront: bool) -> None:
    grid, window = (11, 14), (4, 4)
    order = list(wavefront_order(grid, 4) if wavefront else raster_order(grid))
    schedule = make_schedule(iter(order), window, grid, 3, keep)
    assert [[chunk.cell for chunk in step.chunks] for step in schedule.steps] == order
    cache: dict[int, tuple[tuple[int, int], int]] = {}  # by slot: start of the window, and its positions read so far
    for step in schedule.steps:
        assert len({chunk.slot for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            assert 0 <= chunk.slot < schedule.num_slots
            assert chunk.start == 0 or cache[chunk.slot] == (chunk.window_start, chunk.start)
            cache[chunk.slot] = (chunk.window_start, chunk.start + chunk.count)
    # At most all windows of the upper and the lower border, and those that one step works on.
    assert schedule.num_slots <= min(keep, 2 * (14 - 4 + 1)) + max(len(cells) for cells in order)


def test_crop_reads_a_grid_row_by_row() -> None:
    layout = torch.arange(24).reshape(1, 4, 6)
    assert crop_prefix(layout, (1, 2), (2, 3)).ids.tolist() == [[8, 9, 10, 14, 15, 16]]


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    prefix = torch.tensor([[0]])
    with pytest.raises(UserError, match="narrower than the window of 4 x 4; sample at least 4 columns"):
        sampler((4, 4))(gpt(16), prefix, raster((8, 3), V), seed=0)
    with pytest.raises(UserError, match=r"sampler\.window=\[4,5\]: it has 20 tokens, the prior models 16"):
        sampler((4, 5))(gpt(16), prefix, raster((8, 8), V), seed=0)
    with pytest.raises(RegistryError, match=r"window=.* must be an integer from 1 to 65,536 or null or a list"):
        sampler((0, 5))

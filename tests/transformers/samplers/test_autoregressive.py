"""Filters against brute force, sampling against its distribution, and the autoregressive sampler."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.protocols import Causal
from vqf.registry import RegistryError, build
from vqf.tokens.prefix import Prefix, PrefixSpec
from vqf.transformers.gpt import GPT
from vqf.transformers.samplers.filtering import min_p, sample_from_logits, sample_noise, temperature, top_k, top_p

rows = st.one_of(
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-8, 8)),
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.integers(-3, 3)),  # many ties
)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def allowed(logits: Tensor) -> list[bool]:
    return (logits > -torch.inf).tolist()


@settings(deadline=None)
@given(rows, st.integers(1, 30))
def test_top_k_keeps_whatever_fewer_than_k_are_better_than(logits: np.ndarray, k: int) -> None:
    filtered = top_k(torch.from_numpy(logits)[None], k)[0]
    assert allowed(filtered) == [bool((logits > each).sum() < k) for each in logits]
    assert np.array_equal(filtered[filtered > -torch.inf].numpy(), logits[np.array(allowed(filtered))])


@settings(deadline=None)
@given(rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_best_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    probabilities = softmax(logits)
    expected, total = set(), 0.0
    for index in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        assume(abs(total - p) > 1e-5)  # the sum is float32
        if total < p:
            expected.add(index)
        total += probabilities[index]
    filtered = top_p(torch.from_numpy(logits)[None], p)[0]
    assert allowed(filtered) == [i in expected for i in range(len(logits))]
    assert np.array_equal(filtered[filtered > -torch.inf].numpy(), logits[sorted(expected)])


@settings(deadline=None)
@given(rows)
def test_top_p_of_one_keeps_everything_and_of_nearly_nothing_the_best(logits: np.ndarray) -> None:
    row = torch.from_numpy(logits)[None]
    assert torch.equal(top_p(row, 1.0), row)
    for p in (1e-9, 0.0):
        assert allowed(top_p(row, p)[0]) == [i == int(logits.argmax()) for i in range(len(logits))]


@settings(deadline=None)
@given(rows, st.floats(0.001, 1))
def test_min_p_keeps_what_is_not_too_unlikely_beside_the_best(logits: np.ndarray, p: float) -> None:
    behind = logits - logits.max()  # log of each probability over the best one
    assume(np.abs(behind[behind < 0] - np.log(p)).min(initial=1) > 1e-9)
    filtered = min_p(torch.from_numpy(logits)[None], p)[0]
    assert allowed(filtered) == [bool(each >= np.log(p)) for each in behind]
    assert np.array_equal(filtered[filtered > -torch.inf].numpy(), logits[behind >= np.log(p)])


def test_rounding_never_cuts_the_tail_of_a_large_vocabulary() -> None:
    logits = 3 * torch.randn(20, 65536, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_p(logits, 1.0), logits)


def test_rows_are_filtered_each_by_itself() -> None:
    logits = torch.randn(5, 4, 30, generator=torch.Generator().manual_seed(0))
    for apply in (
        lambda x: top_k(x, 3),
        lambda x: top_p(x, 0.7),
        lambda x: min_p(x, 0.3),
        lambda x: temperature(x, 0.5),
    ):
        apart = torch.stack([torch.stack([apply(row) for row in rows]) for rows in logits])
        assert torch.equal(apply(logits), apart)


@settings(deadline=None)
@given(rows, st.floats(0.05, 20))
def test_temperature_scales_the_log_odds(logits: np.ndarray, value: float) -> None:
    scaled = temperature(torch.from_numpy(logits)[None], value)[0].numpy()
    assert softmax(scaled) == pytest.approx(softmax(logits / value), rel=1e-9)


def test_a_tiny_temperature_takes_the_best() -> None:
    cold = temperature(torch.tensor([[1.0, 3.0, 2.999]]), 1e-30)
    assert cold.softmax(-1).tolist() == [[0, 1, 0]]


def test_filters_compose_as_temperature_then_top_k_then_top_p() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    sampler = build("sampler", {"name": "autoregressive", "temperature": 0.5, "top_k": 3, "top_p": 0.9})
    # Squared: 16, 9, 4, 1. Without the last: 16 and 9 of 29 reach 0.862, so all three stay; of 30 likewise 0.833.
    assert allowed(sampler.filter(probabilities.log())[0]) == [True, True, True, False]
    sampler.top_p = 0.85  # reached by two of the three, but not by two of the four
    assert allowed(sampler.filter(probabilities.log())[0]) == [True, True, False, False]
    sampler.top_k = None
    assert allowed(sampler.filter(probabilities.log())[0]) == [True, True, True, False]
    sampler.min_p = 0.5  # of the best squared: 1, 0.56, 0.25, 0.06
    assert allowed(sampler.filter(probabilities.log())[0]) == [True, True, False, False]
    sampler.min_p = None
    sampler.temperature = 1.0  # 0.4 + 0.3 + 0.2 = 0.9 reaches 0.85
    assert allowed(sampler.filter(probabilities.log())[0]) == [True, True, True, False]


@settings(deadline=None)
@given(rows)
def test_evenly_spread_numbers_draw_in_proportion(logits: np.ndarray) -> None:
    count = 4096
    spread = (torch.arange(count) + 0.5) / count
    indices = sample_from_logits(torch.from_numpy(logits).expand(count, -1), spread)
    frequencies = np.bincount(indices.numpy(), minlength=len(logits))
    assert np.abs(frequencies - count * softmax(logits)).max() < 1.01
    assert (indices.diff() >= 0).all()  # the inverse of a distribution function grows


@settings(deadline=None)
@given(rows, st.integers(0, 2**24 - 1))
def test_a_draw_inverts_the_distribution_function(logits: np.ndarray, number: int) -> None:
    u = number / 2**24
    cumulative = np.cumsum(softmax(logits))
    assume(np.abs(cumulative - u).min() > 1e-6)
    indices = sample_from_logits(torch.from_numpy(logits)[None], torch.tensor([u]))
    assert indices.tolist() == [int((cumulative <= u).sum())]


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-24])
@pytest.mark.parametrize("size", [5, 16384, 262144])
def test_what_was_filtered_out_is_never_drawn(u: float, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, size, generator=generator)
    logits[:, ::2] = -torch.inf
    logits[:, -1:] = -torch.inf
    indices = sample_from_logits(logits, torch.full((8,), u))
    assert (logits.gather(1, indices[:, None]) > -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_draws_take_any_precision(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype).expand(1000, 3)
    indices = sample_from_logits(logits, torch.arange(1000) / 1000)
    expected = 1000 * softmax(np.array([0.0, 1.0, 0.0]))
    assert np.abs(np.bincount(indices.numpy(), minlength=3) - expected).max() < 1.5


def test_uniforms_are_uniform_and_belong_to_one_sample() -> None:
    numbers = torch.stack([sample_noise(5, index, 64) for index in range(1000)])
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 16, 0, 1)
    assert (counts - 4000).abs().max() < 5 * (4000 * 15 / 16) ** 0.5
    assert len(numbers.unique(dim=0)) == 1000
    assert torch.equal(sample_noise(5, 3, 10), sample_noise(5, 3, 64)[:10])


def test_uniforms_stay_the_same_for_years() -> None:
    # Philox 4x64-10 with key (3, 4); its first words are 18178702476816414400, 13750660252389515994, ...
    assert sample_noise(3, 4, 2).tolist() == [
        (18178702476816414400 >> 40) / 2**24,
        (13750660252389515994 >> 40) / 2**24,
    ]


@pytest.mark.parametrize("other", [(1, 0), (2**32, 1), (0, 1 + 2**32), (-1, 1), (0, 2)])
def test_no_two_samples_share_their_numbers(other: tuple[int, int]) -> None:
    assert not torch.equal(sample_noise(0, 1, 8), sample_noise(*other, 8))


class Bigrams:
    """Token 0 from row 0 of a table, token n from the row of token n - 1."""

    layout, groups = raster((2, 2), 3), (1,) * 4

    def __init__(self) -> None:
        self.table = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.05, 0.9, 0.05]])

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        before = torch.cat((torch.zeros(len(tokens), 1, dtype=torch.int64), tokens[:, :-1]), dim=1)
        return self.table[before].log()

    def prefill(self, prefix: Prefix) -> tuple[Tensor, None]:
        return self.table[0].log().expand(len(prefix), 1, 3), None

    def decode(self, tokens: Tensor, cache: None) -> Tensor:
        return self.table[tokens].log()


LAYOUT = raster((3, 4), 13)


def model(**options: object) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(LAYOUT, PrefixSpec(4, 2), layers=2, heads=2, dim=16).double().eval()
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.4)
    return gpt


def prefixes(count: int) -> Tensor:
    return torch.randint(4, (count, 2), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("cache", [True, False])
def test_samples_follow_the_prior(cache: bool) -> None:
    assert isinstance(Bigrams(), Causal)
    sampler = build("sampler", {"name": "autoregressive", "cache": cache})
    count = 20_000
    tokens = sampler(Bigrams(), torch.zeros(count, 1, dtype=torch.int64), raster((1, 2), 3), seed=0)
    table = Bigrams().table
    expected = table[0, :, None] * table
    joint = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9).reshape(3, 3) / count
    assert ((joint - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9}])
def test_the_cache_changes_nothing(options: dict) -> None:
    with_cache = build("sampler", {"name": "autoregressive", **options})
    without = build("sampler", {"name": "autoregressive", "cache": False, **options})
    gpt, prefix = model(), prefixes(16)
    tokens = with_cache(gpt, prefix, LAYOUT, seed=7)
    assert tokens.shape == (16, 12)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, without(gpt, prefix, LAYOUT, seed=7))


def test_a_sample_depends_on_the_seed_and_its_index_alone() -> None:
    sampler = build("sampler", {"name": "autoregressive"})
    gpt, prefix = model(), prefixes(10)
    together = sampler(gpt, prefix, LAYOUT, seed=7, first=100)
    for size in (1, 3):
        parts = [sampler(gpt, prefix[i : i + size], LAYOUT, seed=7, first=100 + i) for i in range(0, 10, size)]
        assert torch.equal(torch.cat(parts), together)
    torch.manual_seed(123)
    assert torch.equal(sampler(gpt, prefix, LAYOUT, seed=7, first=100), together)
    assert not torch.equal(sampler(gpt, prefix, LAYOUT, seed=8, first=100), together)
    assert not torch.equal(sampler(gpt, prefix, LAYOUT, seed=7, first=101), together)


def test_sampling_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build("sampler", {"name": "autoregressive"})(
        Bigrams(), torch.zeros(4, 1, dtype=torch.int64), Bigrams.layout, seed=0
    )
    assert torch.equal(torch.rand(3), expected)


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(bool, (5, 12)))
def test_known_tokens_stay_and_the_rest_follows_from_them(hidden: np.ndarray) -> None:
    # Hiding tokens of a sample, and sampling them again with the same noise, gives the same sample.
    sampler = build("sampler", {"name": "autoregressive", "top_p": 0.9})
    gpt, prefix = model(), prefixes(5)
    tokens = sampler(gpt, prefix, LAYOUT, seed=1)
    known = tokens.masked_fill(torch.from_numpy(hidden), -1)
    before = known.clone()
    assert torch.equal(sampler(gpt, prefix, LAYOUT, seed=1, known=known), tokens)
    assert torch.equal(known, before)


def test_known_tokens_are_kept_even_where_the_prior_would_never_draw_them() -> None:
    sampler = build("sampler", {"name": "autoregressive", "top_k": 1})
    known = torch.tensor([[-1, 2, -1, 0], [-1, -1, -1, -1]])
    tokens = sampler(Bigrams(), torch.zeros(2, 1, dtype=torch.int64), Bigrams.layout, seed=0, known=known)
    assert tokens.tolist() == [[0, 2, 1, 0], [0, 0, 0, 0]]


def test_wrong_known_tokens_are_refused() -> None:
    sampler, prefix = build("sampler", {"name": "autoregressive"}), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"known tokens must be \(2, 4\), not \(2, 3\)"):
        sampler(Bigrams(), prefix, Bigrams.layout, seed=0, known=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="known tokens must be below 3"):
        sampler(Bigrams(), prefix, Bigrams.layout, seed=0, known=torch.full((2, 4), 3))


@pytest.mark.parametrize("cache", [True, False])
def test_a_prior_that_diverged_is_named(cache: bool) -> None:
    gpt = model()
    nn.init.constant_(gpt.head.weight, torch.nan)
    sampler = build("sampler", {"name": "autoregressive", "cache": cache})
    with pytest.raises(UserError, match="not numbers"):
        sampler(gpt, prefixes(2), LAYOUT, seed=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be a number above 0; the default is sampler.temperature=1.0"),
        ({"top_k": 0}, "top_k=0: must be an integer of at least 1 or null; the default is sampler.top_k=null"),
        ({"top_p": 1.1}, r"top_p=1.1: must be a number in \(0, 1\] or null"),
    ],
)
def test_wrong_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(RegistryError, match=words) as caught:
        build("sampler", {"name": "autoregressive", **options})
    assert "\n" not in str(caught.value)

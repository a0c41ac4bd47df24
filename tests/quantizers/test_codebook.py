"""Nearest-neighbor search, straight-through gradient, and usage statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqf.quantizers.codebook import index_counts, nearest, straight_through, usage_stats


def brute_force(vectors: Tensor, codebook: Tensor) -> list[int]:
    """The first index of the least squared distance, one pair at a time."""
    return [min(range(len(codebook)), key=lambda k: float((v - codebook[k]).square().sum())) for v in vectors]


@st.composite
def small_integers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Vectors and a codebook whose distances have no rounding, so that many are exactly equal."""
    dim, count, size = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    entries = st.integers(-2, 2)
    vectors = draw(st.lists(entries, min_size=count * dim, max_size=count * dim))
    codes = draw(st.lists(entries, min_size=size * dim, max_size=size * dim))
    return torch.tensor(vectors).view(count, dim).float(), torch.tensor(codes).view(size, dim).float()


@given(small_integers(), st.integers(1, 40))
def test_nearest_is_the_first_of_the_nearest_whatever_the_chunk(case: tuple[Tensor, Tensor], chunk: int) -> None:
    vectors, codebook = case
    expected = brute_force(vectors, codebook)
    assert nearest(vectors, codebook).tolist() == expected
    assert nearest(vectors, codebook, chunk).tolist() == expected


@pytest.mark.parametrize("chunk", [1, 100, 999, 1 << 24])
def test_nearest_of_real_numbers(chunk: int) -> None:
    torch.manual_seed(0)
    vectors, codebook = torch.randn(57, 8).double(), torch.randn(33, 8).double()
    assert nearest(vectors, codebook, chunk).tolist() == brute_force(vectors, codebook)


def test_nearest_of_nothing() -> None:
    indices = nearest(torch.zeros(0, 4), torch.randn(3, 4))
    assert indices.shape == (0,) and indices.dtype == torch.int64


def test_nearest_holds_one_chunk_of_distances_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    argmin = Tensor.argmin

    def record(self: Tensor, dim: int) -> Tensor:
        rows.append(self.numel())
        return argmin(self, dim)

    monkeypatch.setattr(Tensor, "argmin", record)
    nearest(torch.randn(50, 2), torch.randn(16, 2), chunk=100)
    assert sum(rows) == 50 * 16 and max(rows) <= 100


def test_straight_through_has_the_codes_exactly_and_the_gradient_unchanged() -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    codes = (1e-3 * torch.randn(2, 3, 4, 4)).requires_grad_()  # so small that adding latents would lose digits
    gradient = torch.randn(2, 3, 4, 4)
    out = straight_through(latents, codes)
    out.backward(gradient)
    assert torch.equal(out, codes)
    assert latents.grad is not None and torch.equal(latents.grad, gradient)
    assert codes.grad is None


@given(st.lists(st.integers(0, 6), max_size=30))
def test_histogram_counts(indices: list[int]) -> None:
    counts = index_counts(torch.tensor(indices, dtype=torch.int64).view(1, -1, 1), 7)
    assert counts.tolist() == [indices.count(k) for k in range(7)]


@pytest.mark.parametrize(
    ("counts", "perplexity", "share"),
    [
        ([5, 5, 5, 5], 4.0, 1.0),
        ([9, 0, 0, 0], 1.0, 0.25),
        ([1, 3, 0, 0], math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)), 0.5),
    ],
)
def test_usage(counts: list[int], perplexity: float, share: float) -> None:
    stats = usage_stats(torch.tensor(counts))
    assert float(stats["perplexity"]) == pytest.approx(perplexity, rel=1e-5)
    assert float(stats["batch_usage"]) == share

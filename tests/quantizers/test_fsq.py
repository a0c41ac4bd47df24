"""FSQ against the paper's formula, vector-quantize-pytorch and the authors' one line of iFSQ."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.fsq import Bound, FiniteScalarQuantizer

PAPER = [[8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5]]
BOUNDS: list[Bound] = ["paper", "centered", "symmetric", "ifsq"]
sizes = pytest.mark.parametrize("levels", PAPER, ids=str)
every_bound = pytest.mark.parametrize("bound", BOUNDS)


def latents(channels: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(3, channels, 9, 7, generator=generator, dtype=torch.float64).to(dtype)


def code_of(z: float, levels: int, bound: str) -> tuple[int, float, float]:
    """Digit, value, and derivative of the value, of one number: the formulas, with ε = 1e-3."""
    if bound in ("symmetric", "ifsq"):
        slope = 2.0 if bound == "symmetric" else 1.6
        sigmoid = 1 / (1 + math.exp(-slope * z))
        digit = math.floor((levels - 1) * sigmoid + 0.5)
        return digit, 2 * digit / (levels - 1) - 1, 2 * slope * sigmoid * (1 - sigmoid)
    half = (levels - 1) * (1 - 1e-3 if bound == "paper" else 1 + 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    shift = math.tan(offset / half) if bound == "paper" else math.atanh(offset / half)
    rounded = round(math.tanh(z + shift) * half - offset)
    derivative = (1 - math.tanh(z + shift) ** 2) * half / (levels // 2)
    return rounded + levels // 2, rounded / (levels // 2), derivative


@sizes
@every_bound
def test_codes_indices_and_gradient_follow_the_formula(levels: list[int], bound: Bound) -> None:
    z = latents(len(levels), dtype=torch.float64).requires_grad_()
    q = FiniteScalarQuantizer(levels=levels, bound=bound).double()(z)
    onward = latents(len(levels), 1, torch.float64)
    (gradient,) = torch.autograd.grad((q.latents * onward).sum(), z)
    expected = torch.zeros_like(z), torch.zeros(3, 9, 7).long(), torch.zeros_like(z)
    for b, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(9), torch.arange(7)).tolist():
        place = 1
        for channel, count in enumerate(levels):
            digit, value, derivative = code_of(float(z[b, channel, i, j].detach()), count, bound)
            expected[0].data[b, channel, i, j] = value
            expected[1][b, i, j] += place * digit
            expected[2].data[b, channel, i, j] = derivative * onward[b, channel, i, j]
            place *= count
    assert torch.equal(q.indices, expected[1])
    torch.testing.assert_close(q.latents, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-9, atol=1e-12)
    assert float(q.loss) == 0


@sizes
@pytest.mark.parametrize(("bound", "symmetric"), [("centered", False), ("symmetric", True)])
def test_equals_vector_quantize_pytorch(levels: list[int], bound: Bound, symmetric: bool) -> None:
    theirs = need("vector_quantize_pytorch").FSQ(levels, preserve_symmetry=symmetric)
    ours = FiniteScalarQuantizer(levels=levels, bound=bound)
    z = latents(len(levels)).requires_grad_()
    expected, indices = theirs(z)
    q, onward = ours(z), latents(len(levels), 1)
    assert torch.equal(q.indices, indices.long())
    torch.testing.assert_close(q.latents, expected)
    torch.testing.assert_close(ours.lookup(q.indices), theirs.indices_to_codes(indices))
    gradients = [torch.autograd.grad((out * onward).sum(), z)[0] for out in (q.latents, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("levels", [[3, 5, 7], [9, 9, 17]], ids=str)
def test_equals_the_line_of_ifsq(levels: list[int]) -> None:
    """Their code has odd levels alone: z -> 2 sigmoid(1.6 z) - 1, times (L - 1) / 2, rounded."""
    z, half = latents(3), (torch.tensor(levels)[:, None, None] - 1) / 2
    expected = ((2 * torch.sigmoid(1.6 * z) - 1) * half).round() / half
    torch.testing.assert_close(FiniteScalarQuantizer(levels=levels, bound="ifsq")(z).latents, expected)


def test_ifsq_spreads_normal_latents_more_evenly() -> None:
    """What it is for: the largest distance (Kolmogorov-Smirnov) from a uniform distribution between -1 and 1."""
    z = torch.randn(1, 1, 200, 500, generator=torch.Generator().manual_seed(0))

    def distance(bound: Bound) -> float:
        values = FiniteScalarQuantizer(levels=[1001], bound=bound)(z).latents.flatten().sort().values
        return float((values - torch.linspace(-1, 1, len(values))).abs().max() / 2)

    assert distance("ifsq") < min(0.02, distance("symmetric") / 2)


@given(
    levels=st.lists(st.integers(3, 12), min_size=1, max_size=5),
    bound=st.sampled_from(BOUNDS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    split=st.booleans(),
)
@settings(deadline=None)
def test_lookup_gives_the_latents(
    levels: list[int], bound: Bound, shape: tuple[int, int, int], dtype: torch.dtype, scale: float, split: bool
) -> None:
    factors = [1, len(levels) - 1] if split and len(levels) > 1 else None
    quantizer = FiniteScalarQuantizer(levels=levels, bound=bound, factors=factors).to(dtype)
    batch, height, width = shape
    z = (scale * torch.randn(batch, len(levels), height, width)).to(dtype)
    q = quantizer(z)
    assert q.latents.dtype == dtype and torch.equal(quantizer.lookup(q.indices), q.latents)
    sizes = torch.tensor(quantizer.layout((height, width), 8).vocab_sizes)
    assert q.indices.min() >= 0 and (q.indices.reshape(-1, len(sizes)) < sizes).all()


@every_bound
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_codes(bound: Bound, dtype: torch.dtype) -> None:
    """https://github.com/lucidrains/vector-quantize-pytorch/issues/114: half of the codes were never used in bf16."""
    levels = [8, 8, 8, 5, 5, 5]
    z = latents(6).to(dtype)
    q = FiniteScalarQuantizer(levels=levels, bound=bound).to(dtype)(z)
    assert torch.equal(q.indices, FiniteScalarQuantizer(levels=levels, bound=bound)(z.float()).indices)
    wide = torch.linspace(-4, 4, 4096, dtype=dtype).view(1, 1, 64, 64)
    for count in (5, 8):
        digits = FiniteScalarQuantizer(levels=[count], bound=bound).to(dtype)(wide).indices
        assert digits.unique().tolist() == list(range(count))


@pytest.mark.parametrize("bound", BOUNDS)
def test_infinite_and_invalid_latents_have_an_index(bound: Bound) -> None:
    z = torch.tensor([math.inf, -math.inf, math.nan, 1e30]).view(1, 1, 2, 2)
    indices = FiniteScalarQuantizer(levels=[2001 if bound == "centered" else 5], bound=bound)(z).indices
    assert 0 <= indices.min() and indices.max() < 2001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [8, 1]}, r"levels=\[8,1\]: must be a list of at least 1, each an integer from 2 to"),
        ({"levels": []}, r"levels=\[\]: must be a list of at least 1"),
        ({"levels": [4, 2], "bound": "centered"}, r"at least 3 values with bound=centered"),
        ({"levels": [5, 5], "factors": [1]}, r"^factors=\[1\]: .* must add up to the 2 channels; factors=\[1,1\]"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer(**options)

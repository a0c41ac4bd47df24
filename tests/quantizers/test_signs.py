"""Entropies of codes of signs against all codes enumerated; one bit a channel in every shape and type."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.processes import run_processes
from vqf.distributed import comm
from vqf.metrics.codebook import Usage
from vqf.protocols import Quantized
from vqf.quantizers.bsq import BinarySphericalQuantizer
from vqf.quantizers.lfq import LookupFreeQuantizer
from vqf.quantizers.signs import SignQuantizer, bit_entropy, entropy_groups, mean_entropy
from vqf.training.codebook_usage import CodebookUsage

KINDS: list[type[SignQuantizer]] = [LookupFreeQuantizer, BinarySphericalQuantizer]
kinds = pytest.mark.parametrize("kind", KINDS)


def latents(channels: int, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, 5, 3, generator=generator, dtype=torch.float64)


def dense(logits: Tensor) -> Tensor:
    """p (N, 2^D) of all codes, one product of bits at a time."""
    p = torch.ones(len(logits), 1, dtype=logits.dtype)
    for bit in logits.sigmoid().unbind(1):
        p = torch.cat([p * (1 - bit[:, None]), p * bit[:, None]], 1)
    return p


@pytest.mark.parametrize("bits", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
def test_entropies_and_gradients_are_those_of_all_codes(bits: int, epsilon: float, scale: float) -> None:
    logits = (scale * torch.randn(40, bits, dtype=torch.float64)).requires_grad_()
    p = dense(logits)
    mean = p.mean(0)
    expected = torch.special.entr(p.clamp(min=1e-300)).sum(1).mean()
    found = bit_entropy(logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    expected_usage = -(mean * (mean.clamp(min=1e-300) + epsilon).log()).sum()
    usage = mean_entropy(logits, [bits], epsilon)
    torch.testing.assert_close(usage, expected_usage, rtol=1e-9, atol=1e-12)
    if scale < 100:  # beyond, 1 - sigmoid has no digits left
        for ours, theirs in ((found, expected), (usage, expected_usage)):
            gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (ours, theirs)]
            torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_entropies_have_the_right_ends() -> None:
    certain = torch.full((4, 6), 1e4)
    assert float(bit_entropy(certain)) == float(mean_entropy(certain, [6])) == 0
    undecided = torch.zeros(4, 6)
    assert float(bit_entropy(undecided)) == pytest.approx(6 * math.log(2))
    assert float(mean_entropy(undecided, [2, 4])) == pytest.approx(6 * math.log(2))
    codes = 1e4 * (2.0 * (torch.arange(8)[:, None] >> torch.arange(3) & 1) - 1)
    assert float(mean_entropy(codes, [3])) == pytest.approx(3 * math.log(2))
    assert float(mean_entropy(codes[:2], [3])) == pytest.approx(math.log(2))


def test_groups_are_an_upper_bound() -> None:
    logits = 3 * torch.randn(30, 8, dtype=torch.float64) + torch.randn(30, 1, dtype=torch.float64)
    joint, pairs, bits = (float(mean_entropy(logits, groups)) for groups in ([8], [2] * 4, [1] * 8))
    assert joint < pairs < bits


def test_groups_stay_inside_of_codebooks() -> None:
    assert entropy_groups([6, 12], 0) == [6, 12]
    assert entropy_groups([6, 12], 9) == [6, 9, 3]
    assert entropy_groups([36], 9) == [9, 9, 9, 9]


def test_entropy_of_18_bits_holds_no_matrix_of_all_codes_by_all_latents() -> None:
    largest = 0

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Record():
        q = LookupFreeQuantizer(dim=18)(torch.randn(1, 18, 32, 32))
    assert largest == 1024 * 512, "one half of the bits; all codes by all latents would be 2^28"
    assert 0 < float(q.stats["codebook_entropy"]) < 18 * math.log(2)


def test_too_many_bits_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^entropy_group=0: .* would enumerate 2\^36 codes; .* entropy_group=9"):
        LookupFreeQuantizer(dim=36)
    assert LookupFreeQuantizer(dim=36, entropy=0).vocab_size == 2**36
    assert LookupFreeQuantizer(dim=36, factors=[18, 18]).vocab_size == 2**18


@given(
    kind=st.sampled_from(KINDS),
    factors=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    order=st.sampled_from(["little", "big"]),
)
@settings(deadline=None, max_examples=50)
def test_lookup_gives_the_latents_and_half_precision_the_same_bits(
    kind: type[SignQuantizer], factors: list[int], shape: tuple[int, int, int], dtype: torch.dtype, order: Any
) -> None:
    batch, height, width = shape
    z = torch.randn(batch, sum(factors), height, width).to(dtype)
    quantizer = kind(dim=sum(factors), factors=factors, bit_order=order, entropy_group=1).to(dtype)
    q = quantizer(z)
    assert q.latents.dtype == dtype and torch.equal(quantizer.lookup(q.indices), q.latents)
    assert torch.equal(q.latents > 0, z > 0)
    again = kind(dim=sum(factors), factors=factors, bit_order=order, entropy_group=1)(z.float())
    assert torch.equal(again.indices, q.indices)


@kinds
def test_zero_is_minus(kind: type[SignQuantizer]) -> None:
    q = kind(dim=3)(torch.zeros(1, 3, 1, 1))
    assert q.indices.item() == 0 and (q.latents < 0).all() and q.loss.isfinite()


@kinds
def test_2_to_the_36_codes_in_one_codebook(kind: type[SignQuantizer]) -> None:
    """Nothing has the size of the codebook; usage counts the codes that occur."""
    quantizer = kind(dim=36, entropy_group=9)
    q = quantizer(latents(36).float())
    layout = quantizer.layout((5, 3), 8)
    assert layout.vocab_sizes == (2**36,) and q.indices.max() > 2**32
    assert torch.equal(quantizer.lookup(q.indices), q.latents)
    assert "perplexity" not in q.stats
    tokens = layout.flatten(q.indices)
    metric, window = Usage(layout, "cpu"), CodebookUsage(layout)
    metric.update(type("Batch", (), {"tokens": tokens})())  # type: ignore[arg-type]
    assert metric.compute()["perplexity"] == pytest.approx(30)
    window.update(tokens)
    assert float(window.end_step()["usage_vs_chance"]) == pytest.approx(1, abs=0.01)


@kinds
def test_training_uses_all_codes(kind: type[SignQuantizer]) -> None:
    """Latents that all have one code spread over all of them by the entropy term alone."""
    torch.manual_seed(0)
    z = (1 + 0.1 * torch.randn(1, 3, 16, 16)).requires_grad_()
    quantizer = kind(dim=3, temperature=0.5, diversity=2.0, beta=0.0, entropy_group=3)
    assert float(quantizer(z).stats["batch_usage"]) == 1 / 8
    optimizer = torch.optim.Adam([z], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
    assert float(quantizer(z).stats["batch_usage"]) == 1


def outcome(part: slice) -> dict[str, Tensor]:
    results = {}
    for kind in KINDS:
        z = latents(6, batch=4).requires_grad_()
        q: Quantized = kind(dim=6, factors=[2, 4], temperature=1.0, beta=0.1)(z[part])
        (gradient,) = torch.autograd.grad(q.loss, z)
        mean = {"loss": comm.all_reduce_mean(q.loss.detach()), "gradient": comm.all_reduce_mean(gradient)}
        stats = {key: q.stats[key] for key in ("perplexity", "batch_usage", "codebook_entropy")}
        results |= {f"{kind.__name__} {key}": each for key, each in {**mean, **stats}.items()}
    return results


def of_two() -> dict[str, Tensor]:
    return outcome(slice(2 * comm.rank(), 2 * comm.rank() + 2))


def test_two_processes_have_the_statistics_of_one_with_the_whole_batch() -> None:
    alone = outcome(slice(None))
    for found in run_processes(2, of_two):
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)

"""LFQ against vector-quantize-pytorch, and Open-MAGVIT2's terms with all codes in a matrix."""

import pytest
import torch
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.lfq import LookupFreeQuantizer
from vqf.tokens.layout import TokenLayout


def latents(channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, 5, 4, generator=generator, dtype=torch.float64)


def all_codes(bits: int) -> Tensor:
    return 2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).double() - 1


@pytest.mark.parametrize("factors", [None, [3, 3]])
def test_equals_vector_quantize_pytorch(factors: list[int] | None) -> None:
    """Theirs has the first channel as the highest bit, means over codebooks, and a floor of 1e-5 below logarithms."""
    books = len(factors or [6])
    theirs = need("vector_quantize_pytorch").LFQ(
        dim=6,
        codebook_size=2 ** (6 // books),
        num_codebooks=books,
        commitment_loss_weight=0.25,
        force_quantization_f32=False,
    )
    ours = LookupFreeQuantizer(dim=6, factors=factors, bit_order="big", temperature=0.5, entropy=0.1 / books)
    theirs.double().train(), ours.double()
    z = latents(6).requires_grad_()
    expected, indices, loss = theirs(z, inv_temperature=2.0)
    q, onward = ours(z), latents(6, 1)
    assert torch.equal(q.indices, indices.long())
    torch.testing.assert_close(q.latents, expected)
    torch.testing.assert_close(ours.lookup(q.indices), theirs.indices_to_codes(indices).double())
    torch.testing.assert_close(q.loss, loss, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad((out * onward).sum(), z, retain_graph=True)[0] for out in (q.latents, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(gradients[0], onward)


@pytest.mark.parametrize("factors", [None, [4, 6]])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_loss_and_gradient_are_those_of_open_magvit2(factors: list[int] | None, gamma: float) -> None:
    """logits = 2 z·c / 0.01 over all codes, ln(mean p + 1e-5); with factors it sums over codebooks."""
    z = (0.02 * latents(10)).requires_grad_()
    flat = z.movedim(1, -1).reshape(-1, 10)
    expected = 0.25 * (z - torch.where(z > 0, 1.0, -1.0)).square().mean()
    for part in flat.split(factors or [10], dim=1):
        log_p = (2 * part @ all_codes(part.shape[1]).T / 0.01).log_softmax(1)
        p = log_p.exp()
        certainty, mean = -(p * log_p).sum(1).mean(), p.mean(0)
        expected = expected + 0.1 * (certainty + gamma * (mean * (mean + 1e-5).log()).sum())
    ours = LookupFreeQuantizer(dim=10, factors=factors, diversity=gamma, entropy_epsilon=1e-5).double()
    q = ours(z)
    torch.testing.assert_close(q.loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(each, z)[0] for each in (q.loss, expected)), rtol=1e-7, atol=1e-12)


def test_indices_are_those_of_the_paper_and_of_open_magvit2() -> None:
    """Index(z) = Σ 2^(i-1) 1{z_i > 0}; its 2^6 and 2^12 codes take the first 6 and the last 12 channels."""
    z = latents(18)
    bits = (z > 0).movedim(1, -1).long()
    one, two = LookupFreeQuantizer(), LookupFreeQuantizer(factors=[6, 12])
    powers = torch.tensor([2**i for i in range(18)])
    assert torch.equal(one(z).indices, (bits * powers).sum(-1))
    pair = torch.stack([(bits[..., :6] * powers[:6]).sum(-1), (bits[..., 6:] * powers[:12]).sum(-1)], -1)
    assert torch.equal(two(z).indices, pair)
    assert two.layout((16, 16), 16) == TokenLayout(((16, 16),), (64, 4096), 16)
    assert torch.equal(two.lookup(pair[..., :1])[:, :6], one.lookup(one(z).indices)[:, :6])
    assert not two.lookup(pair[..., :1])[:, 6:].any()

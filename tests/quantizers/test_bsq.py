"""BSQ against the authors' formulas with all codes in a matrix, and vector-quantize-pytorch."""

import math

import pytest
import torch
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.bsq import BinarySphericalQuantizer

D = 6


def latents(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, D, 5, 4, generator=generator, dtype=torch.float64)


def all_codes(bits: int) -> Tensor:
    return (2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).double() - 1) / math.sqrt(D)


@pytest.mark.parametrize("group", [1, 2, 3, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_loss_follows_the_formula(group: int, temperature: float) -> None:
    z = latents().requires_grad_()
    u = z / z.norm(dim=1, keepdim=True)
    q = torch.where(u > 0, 1.0, -1.0) / math.sqrt(D)
    flat = u.movedim(1, -1).reshape(-1, D)
    log_p = (2 * flat @ all_codes(D).T / temperature).log_softmax(1)
    certainty, usage = -(log_p.exp() * log_p).sum(1).mean(), torch.zeros(())
    for part in flat.split(group, dim=1):
        mean = (2 * part @ all_codes(group).T / temperature).softmax(1).mean(0)
        usage = usage - (mean * mean.log()).sum()
    expected = 0.3 * (u - q).square().sum(1).mean() + 0.2 * (certainty - 0.7 * usage)
    options = {"beta": 0.3, "entropy": 0.2, "diversity": 0.7, "temperature": temperature}
    found = BinarySphericalQuantizer(dim=D, entropy_group=group, **options).double()(z).loss  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(each, z, retain_graph=True)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_codes_have_norm_1_and_their_gradient_is_that_of_the_formula() -> None:
    """q = (u + sg[sign(u) - u]) / √D, so the gradient of q goes through u / √D."""
    z, onward = latents().requires_grad_(), latents(1)
    q = BinarySphericalQuantizer(dim=D).double()(z)
    u = z / z.norm(dim=1, keepdim=True)
    expected = (u + (torch.where(u > 0, 1.0, -1.0) - u).detach()) / math.sqrt(D)
    torch.testing.assert_close(q.latents, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(q.latents.norm(dim=1), torch.ones(3, 5, 4).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad((each * onward).sum(), z)[0] for each in (q.latents, expected)))


def test_equals_vector_quantize_pytorch() -> None:
    """Theirs has the first channel as the highest bit, counts all bits together, and a gradient without 1 / √D."""
    theirs = need("vector_quantize_pytorch").LFQ(dim=D, spherical=True, force_quantization_f32=False).double().train()
    ours = BinarySphericalQuantizer(dim=D, bit_order="big", entropy_group=D, temperature=0.5).double()
    z, onward = latents().requires_grad_(), latents(1)
    expected, indices, loss = theirs(z, inv_temperature=2.0)
    q = ours(z)
    assert torch.equal(q.indices, indices.long())
    torch.testing.assert_close(q.latents, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(q.loss, loss, rtol=1e-4, atol=1e-5)
    at_z, at_theirs = (torch.autograd.grad((each * onward).sum(), z)[0] for each in (q.latents, expected))
    torch.testing.assert_close(at_z, at_theirs / math.sqrt(D))


def test_the_error_is_bounded() -> None:
    z = torch.cat([latents(), torch.eye(D).double().view(D, D, 1, 1).expand(D, D, 5, 4)])
    error = (z / z.norm(dim=1, keepdim=True) - BinarySphericalQuantizer(dim=D).double()(z).latents).norm(dim=1)
    assert error.max() == pytest.approx(math.sqrt(2 - 2 / math.sqrt(D)), rel=1e-6)

"""Codes on the unit sphere: against vector-quantize-pytorch and the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.cosine import CosineQuantizer, entropy_loss

V, D = 40, 4


def latents(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, D, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_looks_up_what_vector_quantize_pytorch_looks_up() -> None:
    torch.manual_seed(0)
    ours = CosineQuantizer(dim=D, codebook_size=V).eval()
    ours.codebook.weight.data.mul_(torch.rand(V, 1) + 0.1)  # as after training, when no row has norm 1 any more
    theirs = need("vector_quantize_pytorch").VectorQuantize(D, V, use_cosine_sim=True, accept_image_fmap=True).eval()
    theirs.codebook = F.normalize(ours.codebook.weight.detach(), dim=1)
    z = latents(dtype=torch.float32)
    expected, indices, _ = theirs(z)
    q = ours(z)
    assert torch.equal(q.indices, indices)
    torch.testing.assert_close(q.latents, expected)
    torch.testing.assert_close(ours.lookup(indices), theirs.get_codes_from_indices(indices))


def test_everything_has_norm_1() -> None:
    torch.manual_seed(0)
    cosine = CosineQuantizer(dim=D, codebook_size=V).double()
    assert torch.allclose(cosine.codebook.weight.norm(dim=1), torch.ones(V).double())
    cosine.codebook.weight.data.mul_(7)
    norms = cosine(latents()).latents.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_the_length_of_a_latent_does_not_matter() -> None:
    torch.manual_seed(0)
    cosine = CosineQuantizer(dim=D, codebook_size=V).double()
    one, other = cosine(latents()), cosine(100 * latents())
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-9, atol=0)


def test_loss_and_gradients_follow_the_formula() -> None:
    torch.manual_seed(0)
    cosine = CosineQuantizer(dim=D, codebook_size=V, beta=0.4, weight=2.0).double()
    z, onward = latents().requires_grad_(), latents(1)
    q = cosine(z)
    ((q.latents * onward).sum() + q.loss).backward()
    at_z, at_codes = z.grad, cosine.codebook.weight.grad

    z, codes = latents().requires_grad_(), cosine.codebook.weight.detach().clone().requires_grad_()
    unit = z / z.norm(dim=1, keepdim=True)
    e = torch.stack([codes[k] / codes[k].norm() for k in q.indices.flatten().tolist()]).view(2, 5, 3, D).movedim(-1, 1)
    expected = 2.0 * ((unit.detach() - e).square().mean() + 0.4 * (unit - e.detach()).square().mean())
    torch.testing.assert_close(q.loss, expected, rtol=1e-9, atol=0)
    ((unit * onward).sum() + expected).backward()
    torch.testing.assert_close(at_z, z.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(at_codes, codes.grad, rtol=1e-9, atol=1e-12)


def test_the_entropy_term_is_llamagens() -> None:
    torch.manual_seed(0)
    options = {"dim": D, "codebook_size": V, "entropy_temperature": 0.3}
    without, with_it = (CosineQuantizer(**options, entropy=w).double() for w in (0.0, 0.7))  # type: ignore[arg-type]
    with_it.load_state_dict(without.state_dict())
    z = latents()
    term = 0.0
    probabilities = []
    for vector in F.normalize(z, dim=1).movedim(1, -1).reshape(-1, D):
        affinity = -(vector - F.normalize(without.codebook.weight.detach(), dim=1)).square().sum(1) / 0.3
        p = affinity.exp() / affinity.exp().sum()
        probabilities.append(p)
        term -= float((p * p.log()).sum()) / 30
    mean = torch.stack(probabilities).mean(0)
    term += float((mean * mean.log()).sum())
    difference = float((with_it(z).loss - without(z).loss).detach())
    assert difference == pytest.approx(0.7 * term, rel=1e-9)


def test_the_entropy_term_has_the_right_ends() -> None:
    sure_of_different_codes = 1e4 * torch.eye(8).double()
    assert float(entropy_loss(sure_of_different_codes)) == pytest.approx(-math.log(8), rel=1e-6)
    assert float(entropy_loss(sure_of_different_codes[:1].expand(8, 8))) == pytest.approx(0, abs=1e-6)
    assert float(entropy_loss(torch.zeros(8, 8).double())) == pytest.approx(0, abs=1e-6)

"""The rotation trick: against vector-quantize-pytorch, and the properties that the paper states."""

import pytest
import torch
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.rotation import RotationQuantizer, rotate
from vqf.quantizers.vq import VectorQuantizer

V, D = 16, 5


def vectors(seed: int, dim: int = D) -> Tensor:
    return torch.randn(2, dim, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def gradient(z: Tensor, q: Tensor, onward: Tensor) -> Tensor:
    """The gradient at z, given one at the code vectors."""
    z = z.clone().requires_grad_()
    (at_z,) = torch.autograd.grad(rotate(z, q), z, onward)
    return at_z


def test_values_are_the_codes() -> None:
    z, q = vectors(0), vectors(1)
    torch.testing.assert_close(rotate(z, q), q, rtol=1e-12, atol=1e-12)


def test_gradient_equals_vector_quantize_pytorch() -> None:
    rotate_to = need("vector_quantize_pytorch.vector_quantize_pytorch").rotate_to
    z, q, onward = vectors(0), vectors(1), vectors(2)
    theirs = flat(z).requires_grad_()
    (expected,) = torch.autograd.grad(rotate_to(theirs, flat(q)), theirs, flat(onward))
    torch.testing.assert_close(flat(gradient(z, q, onward)), expected, rtol=1e-9, atol=1e-12)


def test_a_gradient_keeps_its_angle_to_the_vector_and_grows_with_it() -> None:
    z, q, onward = (flat(vectors(i)) for i in range(3))
    at_z = flat(gradient(vectors(0), vectors(1), vectors(2)))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(at_z, z), cosine(onward, q), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(at_z.norm(dim=1) / onward.norm(dim=1), q.norm(dim=1) / z.norm(dim=1), rtol=1e-9, atol=0)


def test_in_the_plane_of_both_vectors_only() -> None:
    """A gradient orthogonal to z and q is only scaled."""
    z, q, onward = vectors(0), vectors(1), vectors(2)
    plane = torch.linalg.qr(torch.stack([flat(z), flat(q)], 2))[0]
    beside = flat(onward)[..., None] - plane @ (plane.mT @ flat(onward)[..., None])
    beside = beside.reshape(2, 3, 4, D).movedim(-1, 1)
    scale = q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient(z, q, beside), scale * beside, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, -1.0, -3.0, 0.0])
def test_vectors_on_one_line_and_zero_give_finite_numbers(factor: float) -> None:
    q, onward = vectors(1), vectors(2)
    assert gradient(factor * q, q, onward).isfinite().all()
    if factor:
        torch.testing.assert_close(rotate(factor * q, q), q, rtol=1e-9, atol=1e-12)


def test_is_vq_but_for_the_gradient_of_the_latents() -> None:
    torch.manual_seed(0)
    vq, rotation = (kind(dim=D, codebook_size=V).double() for kind in (VectorQuantizer, RotationQuantizer))
    torch.nn.init.normal_(vq.codebook.weight)
    rotation.load_state_dict(vq.state_dict())
    z, onward = vectors(0).requires_grad_(), vectors(2)
    first, second = vq(z), rotation(z)
    assert torch.equal(first.indices, second.indices) and torch.equal(first.latents, second.latents)
    assert torch.equal(first.loss, second.loss)
    (at_z,) = torch.autograd.grad(second.latents, z, onward)
    torch.testing.assert_close(at_z, gradient(z.detach(), second.latents.detach(), onward), rtol=1e-12, atol=1e-12)
    for q in (first, second):
        q.loss.backward()
    assert torch.equal(vq.codebook.weight.grad, rotation.codebook.weight.grad)  # type: ignore[arg-type]

"""SimVQ against vector-quantize-pytorch and the formula."""

import torch
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.simvq import SimVQ

V, D = 40, 6


def latents(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, D, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_equals_vector_quantize_pytorch() -> None:
    theirs = need("vector_quantize_pytorch").SimVQ(D, V, rotation_trick=False, channel_first=True).double()
    ours = SimVQ(dim=D, codebook_size=V, bias=False).double()
    ours.load_state_dict({"codebook": theirs.frozen_codebook, "proj.weight": theirs.code_transform.weight})
    z, onward = latents().requires_grad_(), latents(1)
    expected, indices, loss = theirs(z)
    q = ours(z)
    assert torch.equal(q.indices, indices)
    torch.testing.assert_close(q.latents, expected)
    torch.testing.assert_close(q.loss, loss)
    gradients = []
    for out, term, weight in ((q.latents, q.loss, ours.proj.weight), (expected, loss, theirs.code_transform.weight)):
        gradients.append(torch.autograd.grad((out * onward).sum() + term, [z, weight]))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_lookup_applies_the_map() -> None:
    """The authors' get_codebook_entry skips the projection."""
    torch.manual_seed(0)
    simvq = SimVQ(dim=D, codebook_size=V).double()
    indices = simvq(latents()).indices
    expected = simvq.codebook[indices] @ simvq.proj.weight.T + simvq.proj.bias
    torch.testing.assert_close(simvq.lookup(indices), expected.movedim(-1, 1))


def test_a_step_moves_all_codes_and_none_of_the_frozen_vectors() -> None:
    torch.manual_seed(0)
    simvq = SimVQ(dim=D, codebook_size=V)
    frozen, before = simvq.codebook.clone(), simvq.proj(simvq.codebook).detach()
    simvq(latents(dtype=torch.float32)[:1, :, :1, :1]).loss.backward()
    torch.optim.SGD(simvq.parameters(), lr=0.1).step()
    assert torch.equal(simvq.codebook, frozen)
    assert ((simvq.proj(simvq.codebook) - before).abs().sum(1) > 0).all()
    assert "codebook" in simvq.state_dict() and "codebook" not in dict(simvq.named_parameters())


def test_half_precision_chooses_the_nearest_of_its_codes() -> None:
    torch.manual_seed(0)
    simvq, z = SimVQ(dim=D, codebook_size=V).bfloat16().eval(), latents(dtype=torch.bfloat16)
    q = simvq(z)
    assert q.latents.dtype == torch.bfloat16 and torch.equal(simvq.lookup(q.indices), q.latents)
    codes = simvq.proj(simvq.codebook).double()
    distances = torch.cdist(z.double().movedim(1, -1).reshape(-1, D), codes)
    chosen = distances.gather(1, q.indices.view(-1, 1))[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-5, atol=1e-5)

"""VQ against the code of VQGAN."""

import pytest
import torch

from tests.parity.peers import taming
from vqf.quantizers.vq import VectorQuantizer

V, D, BETA = 21, 6, 0.25


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, D, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("beta_placement", "legacy"), [("codebook", True), ("commitment", False)])
def test_equals_the_code_of_vqgan(beta_placement: str, legacy: bool) -> None:
    torch.manual_seed(0)
    theirs = (
        taming("modules.vqvae.quantize").VectorQuantizer2(V, D, BETA, legacy=legacy, sane_index_shape=True).double()
    )
    ours = VectorQuantizer(dim=D, codebook_size=V, beta=BETA, beta_placement=beta_placement).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(ours.codebook.weight)
    theirs.embedding.weight.data.copy_(ours.codebook.weight.data)
    z1, z2, onward = latents().requires_grad_(), latents().requires_grad_(), latents(1)

    expected, expected_loss, (_, _, expected_indices) = theirs(z1)
    ((expected * onward).sum() + expected_loss).backward()
    q = ours(z2)
    ((q.latents * onward).sum() + q.loss).backward()

    assert torch.equal(q.indices, expected_indices)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(q.loss, expected_loss, **close)
    torch.testing.assert_close(q.latents, expected, **close)
    torch.testing.assert_close(z2.grad, z1.grad, **close)
    torch.testing.assert_close(ours.codebook.weight.grad, theirs.embedding.weight.grad, **close)
    torch.testing.assert_close(
        ours.lookup(q.indices), theirs.get_codebook_entry(expected_indices.flatten(), (3, 5, 4, D)), rtol=0, atol=0
    )


def test_begins_with_the_codebook_of_vqgan() -> None:
    torch.manual_seed(7)
    theirs = taming("modules.vqvae.quantize").VectorQuantizer2(V, D, BETA)
    torch.manual_seed(7)
    assert torch.equal(VectorQuantizer(dim=D, codebook_size=V).codebook.weight, theirs.embedding.weight)


def test_the_weight_scales_the_loss_alone() -> None:
    torch.manual_seed(0)
    one = VectorQuantizer(dim=D, codebook_size=V).double()
    three = VectorQuantizer(dim=D, codebook_size=V, weight=3.0).double()
    three.load_state_dict(one.state_dict())
    assert float(three(latents()).loss.detach()) == pytest.approx(3 * float(one(latents()).loss.detach()), rel=1e-12)
    assert torch.equal(three(latents()).latents, one(latents()).latents)


def test_training_moves_codes_to_the_latents_they_stand_for() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    z = centres.repeat(20, 1).T.reshape(1, 2, 3, 20) + 0.01 * torch.randn(1, 2, 3, 20)
    vq = VectorQuantizer(dim=2, codebook_size=3)
    vq.codebook.weight.data.copy_(centres / 10)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        vq(z).loss.backward()
        optimizer.step()
    torch.testing.assert_close(vq.codebook.weight.detach(), centres, rtol=0, atol=0.02)

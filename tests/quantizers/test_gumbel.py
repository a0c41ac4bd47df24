"""Gumbel-softmax: against the code of VQGAN, with its noise and without."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.peers import taming
from vqf.quantizers.gumbel import GumbelQuantizer

V, D, TAU = 13, 6, 0.7
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, D, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(straight_through: bool = True) -> tuple[Any, GumbelQuantizer]:
    """VQGAN's quantizer and ours, with the same weights."""
    torch.manual_seed(0)
    quantize = taming("modules.vqvae.quantize")
    theirs = quantize.GumbelQuantize(D, D, V, straight_through=straight_through, kl_weight=0.3, temp_init=TAU).double()
    ours = GumbelQuantizer(
        dim=D, codebook_size=V, straight_through=straight_through, kl_weight=0.3, temperature_start=TAU
    ).double()
    ours.proj.load_state_dict(theirs.proj.state_dict())
    ours.codebook.load_state_dict(theirs.embed.state_dict())
    return theirs, ours


@pytest.mark.parametrize("straight_through", [True, False])
def test_a_training_step_equals_the_code_of_vqgan(straight_through: bool) -> None:
    theirs, ours = pair(straight_through)
    z1, z2, onward = latents().requires_grad_(), latents().requires_grad_(), latents(1)
    torch.manual_seed(3)
    expected, expected_loss, (_, _, expected_indices) = theirs(z1)
    ((expected * onward).sum() + expected_loss).backward()
    torch.manual_seed(3)
    q = ours(z2)
    ((q.latents * onward).sum() + q.loss).backward()

    assert torch.equal(q.indices, expected_indices)
    torch.testing.assert_close(q.latents, expected, **CLOSE)
    torch.testing.assert_close(q.loss, expected_loss, **CLOSE)
    torch.testing.assert_close(z2.grad, z1.grad, **CLOSE)
    torch.testing.assert_close(ours.proj.weight.grad, theirs.proj.weight.grad, **CLOSE)
    torch.testing.assert_close(ours.codebook.weight.grad, theirs.embed.weight.grad, **CLOSE)


def test_eval_takes_the_likeliest_code_of_vqgan() -> None:
    theirs, ours = pair()
    theirs.eval()
    ours.eval()
    q = ours(latents())
    _, expected_loss, _, logits = theirs(latents(), return_logits=True)
    assert torch.equal(q.indices, logits.argmax(1))
    torch.testing.assert_close(q.loss, expected_loss, **CLOSE)
    codes = theirs.float().get_codebook_entry(q.indices.flatten(), (2, 4, 3, D))  # float32 only
    torch.testing.assert_close(ours.float().lookup(q.indices), codes, rtol=0, atol=0)


def test_eval_is_the_same_every_time_and_training_is_not() -> None:
    _, ours = pair()
    assert len({tuple(ours(latents()).indices.flatten().tolist()) for _ in range(5)}) == 5
    ours.eval()
    assert len({tuple(ours(latents()).indices.flatten().tolist()) for _ in range(5)}) == 1


def test_training_draws_each_code_as_often_as_its_probability() -> None:
    torch.manual_seed(0)
    ours = GumbelQuantizer(dim=D, codebook_size=4)
    z = torch.randn(1, D, 1, 1).expand(1, D, 200, 200)
    p = ours.proj(z)[0, :, 0, 0].softmax(0)
    frequencies = torch.bincount(ours(z).indices.flatten(), minlength=4) / 200**2
    assert (frequencies - p).abs().max() < 4 * 0.5 / 200  # four standard deviations of a frequency


@pytest.mark.parametrize("straight_through", [True, False])
def test_eval_gives_one_code_with_the_gradient_of_the_softmax(straight_through: bool) -> None:
    _, ours = pair(straight_through)
    ours.eval()
    z, onward = latents().requires_grad_(), latents(1)
    q = ours(z)
    (at_z,) = torch.autograd.grad(q.latents, z, onward)
    soft = torch.einsum("bnhw,nd->bdhw", (ours.proj(z) / TAU).softmax(1), ours.codebook.weight)
    (expected,) = torch.autograd.grad(soft, z, onward)
    torch.testing.assert_close(at_z, expected, **CLOSE)
    assert torch.equal(q.latents, ours.lookup(q.indices))


def test_the_temperature_falls_like_vqgans() -> None:
    ours = GumbelQuantizer(dim=D, codebook_size=V, temperature_start=0.9, temperature_end=0.1, anneal_steps=8).double()
    schedule = taming("lr_scheduler").LambdaWarmUpCosineScheduler(0, 0.1, 0.9, 0.9, 8)
    for step in range(12):
        for _ in range(3):  # micro-batches, and a second forward
            temperature = float(ours(latents()).stats["temperature"])
            assert temperature == pytest.approx(schedule(step), rel=1e-9)
        ours.update()
    assert temperature == pytest.approx(0.1, rel=1e-9)


def test_only_steps_move_the_temperature_and_a_checkpoint_keeps_it() -> None:
    options = {"dim": D, "codebook_size": V, "temperature_end": 0.1, "anneal_steps": 4}
    ours, other = (GumbelQuantizer(**options).double() for _ in range(2))  # type: ignore[arg-type]
    for _ in range(2):
        ours(latents())
        ours.update()
    ours.eval()
    for _ in range(3):
        halfway = float(ours(latents()).stats["temperature"])
    assert halfway == pytest.approx(0.5, rel=1e-9)
    other.load_state_dict(ours.state_dict())
    assert float(other(latents()).stats["temperature"]) == halfway


def test_kl_is_0_for_a_uniform_distribution_and_log_v_for_a_sure_one() -> None:
    ours = GumbelQuantizer(dim=D, codebook_size=V, kl_weight=1.0).double()
    torch.nn.init.zeros_(ours.proj.weight)
    torch.nn.init.zeros_(ours.proj.bias)  # type: ignore[arg-type]
    assert float(ours(latents()).loss.detach()) == pytest.approx(0, abs=1e-8)
    ours.proj.bias.data[4] = 1e3  # type: ignore[union-attr]
    assert float(ours(latents()).loss.detach()) == pytest.approx(math.log(V), rel=1e-9)

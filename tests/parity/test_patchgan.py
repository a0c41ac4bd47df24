"""The discriminator, with the weights of the reference's; both name their layers alike."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.comparisons import compares, gradients
from tests.parity.peers import stir, taming
from vqf.discriminators.patchgan import PatchGAN

PART, PEER = "discriminator `patchgan`", "taming `NLayerDiscriminator`"

layers = pytest.mark.parametrize("layers", [2, 3])


def pair(dtype: torch.dtype, layers: int, width: int = 8) -> tuple[Any, PatchGAN]:
    peer = taming("modules.discriminator.model")
    theirs = stir(peer.NLayerDiscriminator(ndf=width, n_layers=layers).apply(peer.weights_init)).to(dtype)
    ours = PatchGAN(3, channels=width, layers=layers).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def averages(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in module.named_buffers() if "running" in name}


@compares(PART, PEER, "logits in train mode")
@compares(PART, PEER, "gradient of the images", "gradients of the weights", exact=True)
@layers
def test_training(dtype: torch.dtype, layers: int, record: Any) -> None:
    """2 and 3 layers, 64 x 48 pixels, batch statistics."""
    theirs, ours = pair(dtype, layers)
    images = torch.randn(3, 3, 64, 48, dtype=dtype)
    pull = torch.randn_like(ours(images))
    logits, at_images = {}, {}
    for side, module in (("ours", ours), ("theirs", theirs)):
        leaf = images.clone().requires_grad_()
        logits[side] = module(leaf)
        logits[side].backward(pull)
        at_images[side] = leaf.grad
    record("logits in train mode", logits["ours"], logits["theirs"])
    record("gradient of the images", at_images["ours"], at_images["theirs"])
    record("gradients of the weights", gradients(ours), gradients(theirs))


@compares(PART, PEER, "running statistics", "logits in eval mode after them")
@layers
def test_evaluation(dtype: torch.dtype, layers: int, record: Any) -> None:
    """2 and 3 layers; the running statistics after three batches, then judging by them."""
    theirs, ours = pair(dtype, layers)
    for scale in (1.0, 0.5, 2.0):
        batch = scale * torch.randn(3, 3, 64, 48, dtype=dtype) + 1 - scale
        ours(batch), theirs(batch)
    record("running statistics", averages(ours), averages(theirs))
    images = torch.randn(3, 3, 64, 48, dtype=dtype)
    record("logits in eval mode after them", ours.eval()(images), theirs.eval()(images))


def test_the_published_width_and_its_spread_at_the_start() -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for norms, and torch's own for the biases of the two ends."""
    peer = taming("modules.discriminator.model")
    theirs, ours = peer.NLayerDiscriminator().apply(peer.weights_init), PatchGAN(3)
    assert sum(each.numel() for each in ours.parameters()) == 2_765_633
    for (name, mine), (_, published) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine.shape == published.shape
        if mine.numel() > 500:
            assert mine.std().item() == pytest.approx(published.std().item(), rel=0.1), name

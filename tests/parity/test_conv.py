"""The convolutional encoder and decoder, with the weights of the reference's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_part
from tests.parity.peers import NOMINAL, SHAPE, WIDTHS, Z, stir, taming
from vqf.encoders.conv import ConvDecoder, ConvEncoder

OPTIONS = {"channels": 32, "multipliers": WIDTHS, "attention": [NOMINAL // 2]}
# Not square; and odd at every level, where the padding on the right and the bottom alone shows.
SIZES = [(NOMINAL, NOMINAL), (24, 40), (37, 53)]


def encoders(dtype: torch.dtype, channels: int = 3) -> tuple[Any, ConvEncoder]:
    theirs = stir(taming("modules.diffusionmodules.model").Encoder(**{**SHAPE, "in_channels": channels})).to(dtype)
    ours = ConvEncoder(channels, NOMINAL, dim=Z, **OPTIONS).to(dtype)
    ours.load_state_dict(from_part(theirs.state_dict(), "encoder"))
    return theirs, ours


def decoders(dtype: torch.dtype) -> tuple[Any, ConvDecoder]:
    theirs = stir(taming("modules.diffusionmodules.model").Decoder(**SHAPE)).to(dtype)
    ours = ConvDecoder(Z, 3, NOMINAL, **OPTIONS).to(dtype)
    ours.load_state_dict(from_part(theirs.state_dict(), "decoder"))
    return theirs, ours


def run(module: nn.Module, inputs: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of <output, pull> at the input and at all parameters."""
    inputs = inputs.clone().requires_grad_()
    output = module(inputs)
    output.backward(pull)
    assert inputs.grad is not None
    return output, inputs.grad, gradients(module)


@compares("encoder `conv`", "taming `Encoder`", "latents")
@compares("encoder `conv`", "taming `Encoder`", "gradient of the images", "gradients of the weights", exact=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoder(dtype: torch.dtype, size: tuple[int, int], record: Any) -> None:
    """16 x 16, 24 x 40 and 37 x 53 pixels; three levels, attention in one and in the middle, shortcuts."""
    theirs, ours = encoders(dtype)
    images = torch.randn(2, 3, *size, dtype=dtype)
    pull = torch.randn_like(ours(images))
    assert pull.shape[2:] == (size[0] // ours.stride, size[1] // ours.stride)
    expected, at_images, at_weights = run(theirs, images, pull)
    output, *found = run(ours, images, pull)
    record("latents", output, expected)
    record("gradient of the images", found[0], at_images)
    record("gradients of the weights", found[1], from_part(at_weights, "encoder"))


@compares("decoder `conv`", "taming `Decoder`", "images")
@compares("decoder `conv`", "taming `Decoder`", "gradient of the latents", "gradients of the weights", exact=True)
@pytest.mark.parametrize("size", [(4, 4), (6, 10), (9, 13)], ids=str)
def test_decoder(dtype: torch.dtype, size: tuple[int, int], record: Any) -> None:
    """Latents of 4 x 4, 6 x 10 and 9 x 13; one more block a level than the encoder, no tanh at the end."""
    theirs, ours = decoders(dtype)
    latents = torch.randn(2, Z, *size, dtype=dtype)
    pull = torch.randn_like(ours(latents))
    expected, at_latents, at_weights = run(theirs, latents, pull)
    output, *found = run(ours, latents, pull)
    record("images", output, expected)
    record("gradient of the latents", found[0], at_latents)
    record("gradients of the weights", found[1], from_part(at_weights, "decoder"))


@compares("decoder `conv`", "taming `Decoder`", "features before the last layer")
def test_features(dtype: torch.dtype, record: Any) -> None:
    """`features`, where the adaptive weight starts from, against the reference with `give_pre_end`."""
    theirs, ours = decoders(dtype)
    latents = torch.randn(2, Z, 8, 8, dtype=dtype)
    theirs.give_pre_end = True
    record(
        "features before the last layer", ours.features(latents), nn.functional.silu(theirs.norm_out(theirs(latents)))
    )


@compares("encoder `conv`", "taming `Encoder`", "latents of images with 1 channel")
def test_one_channel(dtype: torch.dtype, record: Any) -> None:
    """Depth maps, which the reference encodes as images of one channel."""
    theirs, ours = encoders(dtype, channels=1)
    images = torch.randn(2, 1, 32, 32, dtype=dtype)
    record("latents of images with 1 channel", ours(images), theirs(images))


@compares("encoder and decoder `conv`", "taming `Encoder`, `Decoder`", "latents at f16", "images at f16")
def test_f16(dtype: torch.dtype, record: Any) -> None:
    """The real thing: 256 px nominal, width 128, [1, 1, 2, 2, 4], 71,747,971 weights; run on 64 x 64 pixels."""
    real = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": [16], "resolution": 256, "z_channels": 256}
    peer = taming("modules.diffusionmodules.model")
    with torch.device("meta"):
        theirs = nn.ModuleDict({"encoder": peer.Encoder(**SHAPE | real), "decoder": peer.Decoder(**SHAPE | real)})
        ours = nn.ModuleDict({"encoder": ConvEncoder(3, 256), "decoder": ConvDecoder(256, 3, 256)})
    state = {name: torch.empty(each.shape, dtype=dtype) for name, each in theirs.state_dict().items()}
    for each in state.values():  # as wide as the default, drawn faster
        each.normal_(1.0 if each.ndim == 1 else 0.0, each[0].numel() ** -0.5 if each.ndim > 1 else 0.2)
    theirs.load_state_dict(state, assign=True)
    for part in ("encoder", "decoder"):
        ours[part].load_state_dict(from_part(theirs[part].state_dict(), part), assign=True)
    assert sum(each.numel() for each in ours.parameters()) == 71_747_971
    images, latents = torch.randn(1, 3, 64, 64, dtype=dtype), torch.randn(1, 256, 4, 4, dtype=dtype)
    with torch.no_grad():
        record("latents at f16", ours["encoder"](images), theirs["encoder"](images))
        record("images at f16", ours["decoder"](latents), theirs["decoder"](latents))

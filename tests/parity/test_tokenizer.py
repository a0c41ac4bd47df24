"""The whole tokenizer, with the weights of the reference's `VQModel`: what a user of published weights sees."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_vq_model
from tests.parity.peers import CODE_DIM, CODES, NOMINAL, WIDTHS, Z, spread_codes, vq_model
from vqf.encoders.conv import ConvDecoder, ConvEncoder
from vqf.models.tokenizer import Tokenizer
from vqf.quantizers.vq import VectorQuantizer


def pair(dtype: torch.dtype, height: int = 16, width: int = 16) -> tuple[Any, Tokenizer, Tensor]:
    """Build both sides with the same weights, and images whose codes differ."""
    theirs = vq_model(dtype)
    images = torch.rand(3, 3, height, width, dtype=dtype) * 2 - 1
    spread_codes(theirs, images)
    options = {"channels": 32, "multipliers": WIDTHS, "attention": [NOMINAL // 2]}
    ours = Tokenizer(
        ConvEncoder(3, NOMINAL, dim=Z, **options),
        VectorQuantizer(dim=CODE_DIM, codebook_size=CODES, beta_placement="codebook"),
        ConvDecoder(Z, 3, NOMINAL, **options),
        (height, width),
    ).to(dtype)
    ours.load_state_dict(from_vq_model(theirs.state_dict()))
    return theirs, ours, images


@compares("`Tokenizer`", "taming `VQModel`", "indices", "reconstructions", "codebook loss")
@compares("`Tokenizer`", "taming `VQModel`", "gradients of all weights", exact=True)
@pytest.mark.parametrize("size", [(16, 16), (12, 28)], ids=str)
def test_training_pass(dtype: torch.dtype, size: tuple[int, int], record: Any) -> None:
    """A forward and backward of encoder, both 1x1 convolutions, quantizer and decoder, at 16 x 16 and 12 x 28."""
    theirs, ours, images = pair(dtype, *size)
    expected, loss = theirs(images)
    pull = torch.randn_like(expected)
    ((expected * pull).sum() + loss).backward()
    out = ours(images)
    ((out.reconstructions * pull).sum() + out.quantized.loss).backward()
    record("indices", out.quantized.indices.flatten(), theirs.encode(images)[2][2])
    assert len(out.quantized.indices.unique()) > CODES // 2
    record("reconstructions", out.reconstructions, expected)
    record("codebook loss", out.quantized.loss, loss)
    record("gradients of all weights", gradients(ours), from_vq_model(gradients(theirs)))


@compares("`Tokenizer.encode`, `.decode`", "taming `VQModel`", "indices", "images of indices", "codes and back")
def test_codes(dtype: torch.dtype, record: Any) -> None:
    """Indices are (B, h, w) and `decode` takes them back, clamped to [-1, 1]. The reference returns them flat, and its
    own `decode_code` calls a method that does not exist: `get_codebook_entry` and `decode` stand in for it."""
    theirs, ours, images = pair(dtype, 12, 20)
    quantized, _, (_, _, indices) = theirs.encode(images)
    found = ours.encode(images)
    assert found.shape == (3, 3, 5)
    record("indices", found, rearrange(indices, "(b h w) -> b h w", b=3, h=3))
    with pytest.raises(AttributeError):
        theirs.decode_code(indices)
    expected = theirs.decode(theirs.quantize.get_codebook_entry(indices, (3, 3, 5, CODE_DIM)))
    record("images of indices", ours.decode(found), expected.clamp(-1, 1))
    record(
        "codes and back",
        ours.decode_tokens(ours.encode_tokens(images), ours.layout),
        theirs.decode(quantized).clamp(-1, 1),
    )


def test_published_sizes() -> None:
    """The numbers of weights of the published models."""
    for dim, codes, published in ((256, 1024, 72_141_699), (256, 16384, 76_073_859)):
        with torch.device("meta"):
            model = Tokenizer(
                ConvEncoder(3, 256), VectorQuantizer(dim=dim, codebook_size=codes), ConvDecoder(256, 3, 256), (256, 256)
            )
        assert sum(each.numel() for each in model.parameters()) == published
        assert len(model.state_dict()) == 343

"""The tokenizer, with the weights of diffusers' VQModel: the same network under other names."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_diffusers
from tests.parity.peers import CODE_DIM, CODES, Z, need, spread_codes, stir
from vqf.encoders.conv import ConvDecoder, ConvEncoder
from vqf.models.tokenizer import Tokenizer
from vqf.quantizers.vq import VectorQuantizer

LEVELS, SIZE = 3, 16


def pair(dtype: torch.dtype) -> tuple[Any, Tokenizer, Tensor]:
    theirs = need("diffusers").VQModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=2,
        latent_channels=Z,
        num_vq_embeddings=CODES,
        vq_embed_dim=CODE_DIM,
    )
    stir(theirs).to(dtype)
    images = torch.rand(3, 3, SIZE, 20, dtype=dtype) * 2 - 1
    spread_codes(theirs, images)
    options = {"channels": 32, "multipliers": (1, 2, 2), "attention": ()}
    quantizer = VectorQuantizer(dim=CODE_DIM, codebook_size=CODES, beta_placement="codebook")
    encoder, decoder = ConvEncoder(3, SIZE, dim=Z, **options), ConvDecoder(Z, 3, SIZE, **options)
    ours = Tokenizer(encoder, quantizer, decoder, (SIZE, 20)).to(dtype)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), LEVELS))
    return theirs, ours, images


@compares("`Tokenizer`", "diffusers `VQModel`", "latents", "indices", "reconstructions", "codebook loss")
@compares("`Tokenizer`", "diffusers `VQModel`", "gradients of all weights", exact=True)
def test_vq_model(dtype: torch.dtype, record: Any) -> None:
    """16 x 20 pixels, three levels, attention in the middle. Its codebook loss has the misplaced beta as well."""
    theirs, ours, images = pair(dtype)
    latents = theirs.encode(images).latents
    decoded = theirs.decode(latents)
    pull = torch.randn_like(images)
    ((decoded.sample * pull).sum() + decoded.commit_loss).backward()
    out = ours(images)
    ((out.reconstructions * pull).sum() + out.quantized.loss).backward()
    record("latents", ours.quant_conv(ours.encoder(images)), latents)
    indices = theirs.quantize(latents)[2][2]
    record("indices", out.quantized.indices, rearrange(indices, "(b h w) -> b h w", b=3, h=SIZE // 4))
    record("reconstructions", out.reconstructions, decoded.sample)
    record("codebook loss", out.quantized.loss, decoded.commit_loss)
    record("gradients of all weights", gradients(ours), from_diffusers(gradients(theirs), LEVELS))

"""The tokenizer, with the weights of transformers' JanusVQVAE, which has the geometry of LlamaGen's tokenizers."""

from typing import Any

import torch
from torch import Tensor

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_janus
from tests.parity.peers import CODE_DIM, CODES, Z, need, spread_codes, stir
from vqf.encoders.conv import ConvDecoder, ConvEncoder
from vqf.models.tokenizer import Tokenizer
from vqf.quantizers.cosine import CosineQuantizer
from vqf.quantizers.vq import VectorQuantizer

LEVELS, SIZE = 3, 16
GRID = SIZE // 4


def janus(dtype: torch.dtype) -> tuple[Any, Tensor]:
    config = need("transformers.models.janus.configuration_janus").JanusVQVAEConfig(
        embed_dim=CODE_DIM,
        num_embeddings=CODES,
        double_latent=False,
        latent_channels=Z,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=2,
        num_patches=GRID,
        out_channels=3,
    )
    model = need("transformers.models.janus.modeling_janus").JanusVQVAE(config)
    model = stir(model).to(dtype)
    images = torch.rand(3, 3, SIZE, SIZE, dtype=dtype) * 2 - 1
    spread_codes(model, images)
    return model, images


def tokenizer(theirs: Any, quantizer: VectorQuantizer | CosineQuantizer, dtype: torch.dtype) -> Tokenizer:
    # It attends on the last level whatever the resolution; here that level has 4 x 4 cells.
    options = {"channels": 32, "multipliers": (1, 2, 2), "attention": (GRID,)}
    encoder, decoder = ConvEncoder(3, SIZE, dim=Z, **options), ConvDecoder(Z, 3, SIZE, **options)
    ours = Tokenizer(encoder, quantizer, decoder, (SIZE, SIZE)).to(dtype)
    ours.load_state_dict(from_janus(theirs.state_dict(), LEVELS))
    return ours


@compares("`Tokenizer`", "transformers `JanusVQVAE.encode`", "latents", "indices", "codebook loss")
@compares("`Tokenizer`", "transformers `JanusVQVAE.encode`", "gradients of the encoder's weights", exact=True)
def test_encode(dtype: torch.dtype, record: Any) -> None:
    """Its `encode` compares latents with the codebook as it is, so it is our `vq` with the misplaced beta."""
    theirs, images = janus(dtype)
    ours = tokenizer(theirs, VectorQuantizer(dim=CODE_DIM, codebook_size=CODES, beta_placement="codebook"), dtype)
    expected = theirs.encode(images)
    pull = torch.randn_like(expected.quantized_last_hidden_state)
    ((expected.quantized_last_hidden_state * pull).sum() + expected.embedding_loss).backward()
    out = ours.quantize(images)
    ((out.latents * pull).sum() + out.loss).backward()
    record("latents", out.latents, expected.quantized_last_hidden_state)
    record("indices", out.indices.flatten(), expected.image_tokens)
    record("codebook loss", out.loss, expected.embedding_loss)
    encoders = (ours.encoder, theirs.encoder)
    at_weights = [gradients(each) for each in encoders]
    published = from_janus({f"encoder.{name}": each for name, each in at_weights[1].items()}, LEVELS)
    record(
        "gradients of the encoder's weights",
        {f"encoder.{name}": each for name, each in at_weights[0].items()},
        published,
    )


@compares("`Tokenizer` with `cosine`", "transformers `JanusVQVAE.decode`", "images of indices")
def test_decode(dtype: torch.dtype, record: Any) -> None:
    """Its `decode` looks codes up on the unit sphere, as LlamaGen does on both ways, so it is our `cosine`."""
    theirs, _ = janus(dtype)
    ours = tokenizer(theirs, CosineQuantizer(dim=CODE_DIM, codebook_size=CODES), dtype)
    indices = torch.randint(CODES, (3, GRID, GRID))
    record("images of indices", ours.decode(indices), theirs.decode(indices.flatten(1)).clamp(-1, 1))

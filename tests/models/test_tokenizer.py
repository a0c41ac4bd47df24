"""The tokenizer: round trips, sizes, and errors for components that do not fit."""

import pytest
import torch
from omegaconf import OmegaConf

from vqf.errors import UserError
from vqf.models.tokenizer import Tokenizer, build_tokenizer

CONV = {"name": "conv", "channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": []}


def model(**parts: dict[str, object]) -> OmegaConf:
    nodes = {
        "encoder": {**CONV, "dim": 6},
        "decoder": CONV,
        "quantizer": {"name": "vq", "dim": 4, "codebook_size": 16},
    }
    return OmegaConf.create({**nodes, **parts})


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(model(), 16).eval()


def test_published_size_of_the_preset() -> None:
    conv = {"name": "conv"}
    with torch.device("meta"):
        built = build_tokenizer(OmegaConf.create({"encoder": conv, "decoder": conv, "quantizer": {"name": "vq"}}), 256)
    assert sum(p.numel() for p in built.parameters()) == 72_141_699
    assert len(built.state_dict()) == 343


def test_encode_decode_reconstruct(tokenizer: Tokenizer) -> None:
    tokenizer, images = tokenizer.double(), torch.rand(2, 3, 16, 24, dtype=torch.double) * 2 - 1
    indices = tokenizer.encode(images)
    assert indices.shape == (2, 8, 12)
    assert indices.dtype == torch.int64
    decoded = tokenizer.decode(indices)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, tokenizer(images).reconstructions.clamp(-1, 1), atol=1e-9, rtol=1e-9)


def test_tokens_are_row_by_row(tokenizer: Tokenizer) -> None:
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    tokens, indices = tokenizer.encode_tokens(images), tokenizer.encode(images)
    assert tokens[0, 12 * 3 + 5] == indices[0, 3, 5]
    torch.testing.assert_close(tokenizer.decode_tokens(tokens, tokenizer.layout_of((8, 12))), tokenizer.decode(indices))


@pytest.mark.parametrize("kernel", [1, 3, None])
def test_the_projection_around_the_quantizer(kernel: int | None) -> None:
    """Without one, a latent of one cell comes from that cell alone and reaches the quantizer as it is."""
    built = build_tokenizer(
        model(projection=kernel, quantizer={"name": "vq", "dim": 6, "codebook_size": 16}), 16
    ).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    weights = [name for name in built.state_dict() if "quant_conv" in name]
    if kernel is None:
        assert weights == []
        assert torch.equal(built.quantize(images).indices, built.quantizer(built.encoder(images)).indices)
    else:
        assert built.quant_conv.weight.shape == built.post_quant_conv.weight.shape == (6, 6, kernel, kernel)
    assert built(images).reconstructions.shape == images.shape


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (None, "model.projection=null: the encoder has 6 channels, the quantizer 4; set model.encoder.dim"),
        (2, "model.projection=2: must be 1 or 3, the kernel size of a convolution, or null"),
    ],
)
def test_a_projection_that_cannot_be(projection: int | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_tokenizer(model(projection=projection), 16)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("channels", "output"), [(3, "logits"), (3, "image"), (1, "image")])
def test_colors_are_clamped_and_logits_are_not(channels: int, output: str) -> None:
    built = build_tokenizer(model(), 16, channels, output).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        built.decoder.last_layer.bias += 3.0  # type: ignore[operator]
    decoded = built.decode(torch.zeros(1, 8, 8, dtype=torch.int64))
    assert (decoded.max() > 1) == (output == "logits")
    assert built.to_rgb(decoded).shape == (1, 3, 16, 16)


def test_the_quantizer_works_in_float32_under_autocast(tokenizer: Tokenizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.quantize(torch.rand(1, 3, 16, 16)).latents.dtype == torch.float32


def test_fingerprint_follows_the_weights(tokenizer: Tokenizer) -> None:
    before = tokenizer.fingerprint()
    assert before == tokenizer.fingerprint()
    with torch.no_grad():
        tokenizer.decoder.last_layer.bias[0] += 1e-6
    assert tokenizer.fingerprint() != before


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 15, 16), "multiples of the encoder's stride 2, not 15 x 16"),
        ((3, 16, 16), "images must be (B, 3, H, W) in [-1, 1], not (3, 16, 16)"),
        ((1, 1, 16, 16), "images must be (B, 3, H, W) in [-1, 1], not (1, 1, 16, 16)"),
    ],
)
def test_images_that_cannot_be_encoded(tokenizer: Tokenizer, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        tokenizer.encode(torch.zeros(shape))
    assert words in str(caught.value)


def test_an_image_size_that_the_stride_does_not_divide() -> None:
    with pytest.raises(UserError) as caught:
        build_tokenizer(model(), 33)
    assert str(caught.value) == (
        "image_size=33: the stride 2 of encoder 'conv' must divide it; the nearest that fits is image_size=32"
    )


def test_encoder_and_decoder_must_mirror_each_other() -> None:
    with pytest.raises(UserError, match="enlarges by 4, encoder 'conv' shrinks by 2"):
        build_tokenizer(model(decoder={**CONV, "multipliers": [1, 1, 1]}), 16)

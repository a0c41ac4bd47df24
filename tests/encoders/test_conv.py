"""The convolutional encoder and decoder: parameters as published, shapes, and resolutions with attention."""

import pytest
import torch
from torch import nn

from vqf.encoders.conv import ConvDecoder, ConvEncoder
from vqf.encoders.conv_blocks import AttentionBlock, Downsample

PUBLISHED = {"channels": 128, "multipliers": (1, 1, 2, 2, 4), "blocks": 2, "attention": (16,)}


def count(module: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in module.parameters()), len(module.state_dict())


def test_published_sizes() -> None:
    with torch.device("meta"):
        encoder = ConvEncoder(3, 256, dim=256, **PUBLISHED)
        decoder = ConvDecoder(256, 3, 256, **PUBLISHED)
    assert count(encoder) == (29_298_176, 144)
    assert count(decoder) == (42_449_795, 194)


@pytest.mark.parametrize(
    ("multipliers", "patch_size", "stride"), [((1,), 1, 1), ((1, 2), 1, 2), ((1, 1, 2), 1, 4), ((1, 2), 4, 8)]
)
def test_strides_and_shapes(multipliers: tuple[int, ...], patch_size: int, stride: int) -> None:
    options = {"channels": 8, "multipliers": multipliers, "blocks": 1, "attention": (), "patch_size": patch_size}
    encoder = ConvEncoder(3, 32, dim=5, **options)
    decoder = ConvDecoder(5, 3, 32, **options)
    assert encoder.stride == decoder.stride == stride
    images = torch.randn(2, 3, 32, 48)
    latents = encoder(images)
    assert latents.shape == (2, 5, 32 // stride, 48 // stride)
    assert decoder(latents).shape == images.shape
    torch.testing.assert_close(decoder.last_layer(decoder.features(latents)), decoder(latents))


def test_attention_follows_the_nominal_resolution() -> None:
    encoder = ConvEncoder(3, 64, channels=8, multipliers=(1, 1, 1), attention=(32, 16), middle_attention=False)
    assert [len(level.attn) for level in encoder.down] == [0, 2, 2]
    decoder = ConvDecoder(8, 3, 64, channels=8, multipliers=(1, 1, 1), attention=(32,), middle_attention=False)
    assert [len(level.attn) for level in decoder.up] == [0, 3, 0]
    assert not any(isinstance(each, AttentionBlock) for each in encoder.mid)


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(8).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.double)
    h = block.norm(x)
    q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (block.q, block.k, block.v))
    weights = torch.softmax(q @ k.transpose(1, 2) * 8**-0.5, dim=-1)
    expected = x + block.proj_out((weights @ v).transpose(1, 2).reshape(2, 8, 3, 4))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_downsampling_pads_right_and_bottom_only() -> None:
    layer = Downsample(1)
    nn.init.zeros_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    layer.conv.weight.data[0, 0, 0, 0] = 1.0  # copies the top left pixel of each window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_odd_sizes_round_down() -> None:
    encoder = ConvEncoder(3, 32, channels=8, multipliers=(1, 1, 1), blocks=1, attention=(), dim=4)
    assert encoder(torch.randn(1, 3, 43, 37)).shape == (1, 4, 10, 9)

"""The convolutional encoder and decoder without attention: parameters, sizes, how far a pixel reaches, tiles."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.support.composing import compose
from vqf.encoders.magvit import DepthToSpace, MagvitDecoder, MagvitEncoder
from vqf.models.tokenizer import build_tokenizer
from vqf.protocols import TiledDecoding, TiledEncoding

SMALL = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(kind: type[nn.Module], *wired: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*wired, **{**SMALL, **options}).double()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def conv(source: int, target: int, kernel: int = 3) -> int:
    return source * target * kernel**2 + target


def block(source: int, target: int) -> int:
    shortcut = conv(source, target, 1) if source != target else 0
    return 2 * source + conv(source, target) + 2 * target + conv(target, target) + shortcut


def test_the_size_of_maskgit() -> None:
    """Width 128 times (1, 1, 2, 2, 4), two blocks a resolution, latents of 256: layer by layer as in its paper."""
    with torch.device("meta"):
        encoder, decoder, nearest = MagvitEncoder(3), MagvitDecoder(256, 3), MagvitDecoder(256, 3, upsample="nearest")
    down = [(128, 128)] * 4 + [(128, 256)] + [(256, 256)] * 3 + [(256, 512)] + [(512, 512)] * 3
    up = [(512, 512)] * 4 + [(512, 256)] + [(256, 256)] * 3 + [(256, 128)] + [(128, 128)] * 3
    blocks = sum(block(*each) for each in down)
    assert count(encoder) == conv(3, 128) + blocks + 2 * 512 + conv(512, 256, 1)
    ends = conv(256, 512) + 2 * 128 + conv(128, 3)
    widths = (512, 256, 256, 128)
    assert count(nearest) == ends + sum(block(*each) for each in up) + sum(conv(w, w) for w in widths)
    assert count(decoder) - count(nearest) == sum(conv(w, 4 * w) - conv(w, w) for w in widths)


@pytest.mark.parametrize("upsample", ["depth_to_space", "nearest"])
@pytest.mark.parametrize(("multipliers", "stride"), [((1,), 1), ((1, 2), 2), ((1, 2, 2), 4)])
def test_strides_sizes_and_aspects(multipliers: tuple[int, ...], stride: int, upsample: str) -> None:
    encoder = make(MagvitEncoder, 3, dim=5, multipliers=multipliers)
    decoder = make(MagvitDecoder, 5, 3, multipliers=multipliers, upsample=upsample)
    assert encoder.stride == decoder.stride == stride
    images = noise(2, 3, 16, 40)
    latents = encoder(images)
    assert latents.shape == (2, 5, 16 // stride, 40 // stride)
    assert decoder(latents).shape == images.shape


def without_norms(module: Any) -> Any:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    return module


def test_only_group_norms_see_the_full_image() -> None:
    encoder, images = make(MagvitEncoder, 3, dim=5), noise(1, 3, 16, 160).requires_grad_()
    encoder(images)[..., 0].sum().backward()
    assert images.grad is not None and (images.grad[..., -1].abs() > 0).any()
    images.grad = None
    without_norms(encoder)(images)[..., 0].sum().backward()
    assert (images.grad[..., 0].abs() > 0).any() and not images.grad[..., 80:].any()


def test_a_constant_image_has_constant_latents_inside() -> None:
    """Average pooling and zero padding: far from the border nothing tells cells apart."""
    latents = without_norms(make(MagvitEncoder, 3, dim=5))(torch.full((1, 3, 160, 160), 0.3).double())
    middle = latents[:, :, 18:22, 18:22]
    torch.testing.assert_close(middle, middle[:, :, :1, :1].expand_as(middle))


def test_depth_to_space_puts_four_channels_into_a_square() -> None:
    layer = DepthToSpace(1)
    nn.init.zeros_(layer.conv.weight)
    assert layer.conv.bias is not None
    layer.conv.bias.data = torch.arange(4.0)
    assert layer(torch.zeros(1, 1, 1, 2)).tolist() == [[[[0.0, 1.0, 0.0, 1.0], [2.0, 3.0, 2.0, 3.0]]]]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    coder = make(MagvitEncoder, 3, dim=5) if kind == "encoder" else make(MagvitDecoder, 5, 3)
    coder(noise(2, 3, 16, 16) if kind == "encoder" else noise(2, 5, 4, 4)).pow(3).sum().backward()
    assert [key for key, p in coder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_tiles_give_the_image_of_one_pass() -> None:
    assert isinstance(make(MagvitEncoder, 3), TiledEncoding) and isinstance(make(MagvitDecoder, 5, 3), TiledDecoding)
    options = ["channels=8", "multipliers=[1,2,2]", "blocks=1"]
    chosen = [f"model.{kind}.{option}" for kind in ("encoder", "decoder") for option in options]
    config = compose("model=vqvae", "model/encoder=magvit", "model/decoder=magvit", *chosen)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.model, 32).eval()
    indices = torch.randint(tokenizer.quantizer.vocab_size, (1, 72, 40))
    decoder = cast(MagvitDecoder, tokenizer.decoder)
    latents = tokenizer.post_quant_conv(tokenizer.quantizer.lookup(indices))
    assert torch.equal(decoder.local_features(decoder.global_features(latents)), decoder.features(latents))
    # 32 cells: the smallest tile with the full overlap, `TILE_OVERLAP`.
    assert (tokenizer.decode(indices, tile=32) - tokenizer.decode(indices)).abs().max() < 2 / 255

"""Latents without places: parameters, sizes, that each sees the whole image, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vqf.encoders.titok as titok
from vqf.encoders.titok import TiTokDecoder, TiTokEncoder
from vqf.protocols import Unplaced

SMALL = {"patch_size": 4, "width": 16, "layers": 2, "heads": 2}


def make(kind: type[nn.Module], *wired: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*wired, **{**SMALL, **options}).double()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("width", "layers", "heads"), [(512, 8, 8), (768, 12, 12), (1024, 24, 16)])
def test_the_sizes_of_the_paper_have_as_many_parameters_as_in_timm(width: int, layers: int, heads: int) -> None:
    """Besides timm's: the queries in place of the class token and positions, and the projection to 12 channels."""
    from timm.models.vision_transformer import VisionTransformer as Timm

    with torch.device("meta"):
        peer = Timm(256, 16, num_classes=0, embed_dim=width, depth=layers, num_heads=heads)
        encoder = TiTokEncoder(3, 256, width=width, layers=layers, heads=heads, num_latents=128)
    assert peer.cls_token is not None and peer.pos_embed is not None
    transformer = count(peer) - peer.cls_token.numel() - peer.pos_embed.numel()
    assert count(encoder) == transformer + 128 * width + (width + 1) * 12


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (4, 4)])
@pytest.mark.parametrize("num_latents", [1, 7])
def test_any_size_aspect_and_number_of_latents(size: tuple[int, int], num_latents: int) -> None:
    encoder = make(TiTokEncoder, 3, size, dim=5, num_latents=num_latents)
    latents = encoder(noise(2, 3, *size))
    assert isinstance(encoder, Unplaced) and encoder.stride is None
    assert latents.shape == (2, 5, 1, num_latents)
    assert make(TiTokDecoder, 5, 3, size, patch_size=2)(latents).shape == (2, 3, *size)


def test_every_latent_sees_every_pixel_and_every_pixel_every_latent() -> None:
    images = noise(1, 3, 16, 16).requires_grad_()
    encoder, decoder = make(TiTokEncoder, 3, 16, dim=5, num_latents=3), make(TiTokDecoder, 5, 3, 16)
    for i in range(3):
        (grad,) = torch.autograd.grad(encoder(images)[..., i].pow(3).sum(), images)
        assert (grad.abs() > 0).all()
    latents = noise(1, 5, 1, 3).requires_grad_()
    for row, column in ((0, 0), (15, 15), (3, 9)):
        (grad,) = torch.autograd.grad(decoder(latents)[:, :, row, column].pow(3).sum(), latents)
        assert (grad.abs() > 0).all()


def test_a_permutation_of_queries_permutes_latents() -> None:
    encoder, images = make(TiTokEncoder, 3, 16, dim=5, num_latents=6), noise(2, 3, 16, 16)
    order, expected = torch.tensor([3, 0, 5, 1, 4, 2]), encoder(images)
    encoder.queries.data = encoder.queries.data[order]
    torch.testing.assert_close(encoder(images), expected[..., order])


def test_the_order_of_latents_counts_by_their_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, latents = make(TiTokDecoder, 5, 3, 16), noise(2, 5, 1, 6)
    assert (decoder(latents.flip(-1)) - decoder(latents)).abs().max() > 1e-4
    monkeypatch.setattr(titok, "add_positions", lambda cells: cells.flatten(2).transpose(1, 2))
    torch.testing.assert_close(decoder(latents.flip(-1)), decoder(latents))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    coder = make(TiTokEncoder, 3, 32, dim=5) if kind == "encoder" else make(TiTokDecoder, 5, 3, 32)
    coder(noise(2, 3, 32, 32) if kind == "encoder" else noise(2, 5, 1, 7)).pow(3).sum().backward()
    assert [key for key, p in coder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("wired", [(TiTokEncoder, 3), (TiTokDecoder, 5, 3)])
def test_patches_must_fill_the_image(wired: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="patch_size=4 must divide the sides of the images, 32 x 30 pixels"):
        make(*wired, (32, 30))

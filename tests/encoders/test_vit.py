"""The vision transformers: against timm's and against attention by hand, any size, equivariance, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vqf.encoders.vit_blocks as vit_blocks
from vqf.encoders.vit import ViTDecoder, ViTEncoder
from vqf.encoders.vit_blocks import Block, VisionTransformer, sincos_positions

SMALL = {"patch_size": 4, "width": 16, "layers": 2, "heads": 2}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(kind: type[nn.Module], *wired: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*wired, **{**SMALL, **options}).double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize(("width", "layers", "heads"), [(512, 8, 8), (768, 12, 12), (1280, 32, 16)])
def test_the_sizes_of_the_paper_have_as_many_parameters_as_in_timm(width: int, layers: int, heads: int) -> None:
    """In timm with a class token and learned positions, here with a head of two layers."""
    from timm.models.vision_transformer import VisionTransformer as Timm

    with torch.device("meta"):
        peer = Timm(256, 8, num_classes=0, embed_dim=width, depth=layers, num_heads=heads)
        encoder = ViTEncoder(3, dim=width, width=width, layers=layers, heads=heads)
        decoder = ViTDecoder(width, 3, width=width, layers=layers, heads=heads)
    assert peer.cls_token is not None and peer.pos_embed is not None
    transformer = count(peer) - peer.cls_token.numel() - peer.pos_embed.numel()
    hidden = 4 * width
    assert count(encoder) == transformer + (width + 1) * hidden + (hidden + 1) * width
    patch_embedding = (3 * 8 * 8 + 1) * width
    assert count(decoder) == (
        transformer - patch_embedding + (width + 1) * width + (width + 1) * hidden + hidden * 3 * 8 * 8 + 3
    )


def test_the_transformer_computes_what_timm_computes_with_its_weights() -> None:
    from timm.models.vision_transformer import VisionTransformer as Timm

    torch.manual_seed(0)
    bare = {"num_classes": 0, "class_token": False, "pos_embed": "none", "global_pool": ""}
    peer = Timm(32, 4, embed_dim=16, depth=3, num_heads=4, **bare).double()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = VisionTransformer(16, 3, 4, 64, 0.0, False).double()
    weights = peer.state_dict()
    ours.load_state_dict({key: weights[key] for key in ours.state_dict()})
    images = noise(2, 3, 32, 32)
    expected = peer.forward_features(images)
    torch.testing.assert_close(ours(peer.patch_embed(images)), expected, rtol=1e-10, atol=1e-10)


def test_a_block_is_softmax_attention_and_an_mlp() -> None:
    torch.manual_seed(0)
    block = Block(12, 3, 24, 0.0).double()
    x = noise(2, 5, 12)
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    heads = []
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 2, dim=-1)
        heads.append(weights @ v[..., part])
    h = x + block.attn.proj(torch.cat(heads, dim=-1))
    inner = block.mlp.fc1(block.norm2(h))
    expected = h + block.mlp.fc2(inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (3, 5), (8, 8)])
def test_positions_are_those_of_timm(grid: tuple[int, int]) -> None:
    from timm.layers import build_sincos2d_pos_embed

    expected = build_sincos2d_pos_embed(list(grid), dim=32, interleave_sin_cos=False)
    torch.testing.assert_close(sincos_positions(grid, 32, torch.zeros(1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (4, 4), (20, 8)])
def test_any_size_and_aspect(size: tuple[int, int]) -> None:
    encoder, decoder = make(ViTEncoder, 3, dim=5), make(ViTDecoder, 5, 3)
    images = noise(2, 3, *size)
    latents = encoder(images)
    assert latents.shape == (2, 5, size[0] // 4, size[1] // 4)
    assert decoder(latents).shape == images.shape


def patches(images: Tensor) -> Tensor:
    return images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).movedim(2, 0)


def test_without_positions_a_permutation_of_patches_permutes_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images = make(ViTEncoder, 3, dim=5), noise(2, 3, 8, 16)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    shuffled = patches(images)[order].movedim(0, 2).unflatten(2, (2, 4))
    shuffled = shuffled.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    torch.testing.assert_close(patches(shuffled), patches(images)[order])
    with_positions = encoder(shuffled).flatten(2), encoder(images).flatten(2)[:, :, order]
    assert (with_positions[0] - with_positions[1]).abs().max() > 1e-3
    monkeypatch.setattr(vit_blocks, "sincos_positions", lambda grid, width, like: like.new_zeros(()))
    torch.testing.assert_close(encoder(shuffled).flatten(2), encoder(images).flatten(2)[:, :, order])


def test_a_pixel_of_the_image_comes_from_the_features_of_its_patch() -> None:
    decoder = make(ViTDecoder, 5, 3)
    features = decoder.features(noise(1, 5, 2, 3)).detach()
    changed = features.clone()
    changed[:, :, 1, 2] += 1
    difference = (decoder.last_layer(changed) - decoder.last_layer(features)).abs().sum((0, 1)) > 0
    assert difference[4:, 8:].any() and not difference[:4].any() and not difference[:, :8].any()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    coder = make(ViTEncoder, 3, dim=5) if kind == "encoder" else make(ViTDecoder, 5, 3)
    coder(noise(2, 3, 32, 32) if kind == "encoder" else noise(2, 5, 8, 8)).pow(3).sum().backward()
    assert [key for key, p in coder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (18, 2)])
def test_a_width_that_cannot_be_split_is_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"width={width} must be a multiple of heads={heads} and of 4"):
        make(ViTEncoder, 3, width=width, heads=heads)

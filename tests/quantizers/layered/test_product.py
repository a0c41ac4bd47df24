"""Product quantization: each group as its quantizer alone, vector-quantize-pytorch, round trips, wrong options."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parity.peers import need
from vqf.quantizers.layered.product import ProductQuantizer
from vqf.registry import RegistryError, build

V, D, G = 7, 3, 4
VQ: dict[str, Any] = {"name": "vq", "dim": D, "codebook_size": V}
COSINE: dict[str, Any] = {"name": "cosine", "dim": D, "codebook_size": V}
EMA: dict[str, Any] = {"name": "ema", "dim": D, "codebook_size": V, "revive": 0.0}
RESIDUAL: dict[str, Any] = {"name": "residual", "base": VQ, "depth": 2, "shared": False}
FSQ: dict[str, Any] = {"name": "fsq", "levels": [5, 4, 3], "factors": [2, 1]}
BASES = [VQ, COSINE, EMA, RESIDUAL, FSQ]


def latents(channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 5, 3, generator=generator, dtype=torch.float64).to(dtype)


def product(base: dict[str, Any], groups: int = G) -> ProductQuantizer:
    torch.manual_seed(0)
    return ProductQuantizer(base=base, groups=groups).double().eval()


def groups_of(quantizer: ProductQuantizer) -> list[Any]:
    return list(quantizer.groups)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["name"])
def test_each_group_is_quantized_as_by_its_quantizer_alone(base: dict[str, Any]) -> None:
    quantizer = product(base)
    z = latents(quantizer.dim).requires_grad_()
    q = quantizer(z)
    alone = [group(part) for group, part in zip(groups_of(quantizer), z.chunk(G, dim=1), strict=True)]
    assert torch.equal(q.latents, torch.cat([each.latents for each in alone], 1))
    indices = torch.cat([each.indices.reshape(2, 5, 3, -1) for each in alone], -1)
    assert torch.equal(q.indices, indices)
    torch.testing.assert_close(q.loss, sum(each.loss for each in alone) / G)
    if q.loss.requires_grad:
        (gradient,) = torch.autograd.grad(q.loss, z, retain_graph=True)
        (expected,) = torch.autograd.grad(sum(each.loss for each in alone) / G, z)
        torch.testing.assert_close(gradient, expected)


def test_the_gradient_passes_through() -> None:
    quantizer, onward = product(VQ), latents(G * D, 1)
    z = latents(G * D).requires_grad_()
    (gradient,) = torch.autograd.grad((quantizer(z).latents * onward).sum(), z)
    torch.testing.assert_close(gradient, onward, rtol=0, atol=0)


def test_equals_vector_quantize_pytorchs_groups() -> None:
    """Its groups of residuals of depth 1; indices of groups come first there."""
    peer = need("vector_quantize_pytorch").GroupedResidualVQ
    theirs = peer(dim=G * D, groups=G, num_quantizers=1, codebook_size=V, rotation_trick=False, decay=0.8).eval()
    ours = ProductQuantizer(base=EMA, groups=G).eval()
    for group, rvq in zip(groups_of(ours), theirs.rvqs, strict=True):
        group.codebook.copy_(codes := torch.randn(V, D))
        rvq.layers[0]._codebook.embed.data.copy_(codes[None])
    z = latents(G * D, dtype=torch.float32)
    expected, indices, _ = theirs(z.flatten(2).transpose(1, 2))
    q = ours(z)
    assert torch.equal(q.indices.flatten(1, 2), indices[..., 0].movedim(0, -1))
    torch.testing.assert_close(q.latents.flatten(2).transpose(1, 2), expected)


@given(
    base=st.sampled_from(BASES),
    groups=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=40)
def test_lookup_gives_the_latents_of_all_and_of_the_first_codebooks(
    base: dict[str, Any], groups: int, grid: tuple[int, int, int], dtype: torch.dtype
) -> None:
    quantizer = product(base, groups).to(dtype)
    batch, height, width = grid
    q = quantizer(torch.randn(batch, quantizer.dim, height, width, dtype=dtype))
    layout = quantizer.layout((height, width), 8)
    assert q.latents.dtype == dtype and torch.equal(quantizer.lookup(q.indices), q.latents)
    tokens = layout.flatten(q.indices)
    assert torch.equal(layout.unflatten(tokens), q.indices)
    assert (layout.by_codebook(tokens) < torch.tensor(layout.vocab_sizes)).all()
    for k in range(1, groups):
        first = quantizer.lookup(q.indices[..., : k * layout.codebooks // groups])
        channels = k * quantizer.dim // groups
        assert torch.equal(first[:, :channels], q.latents[:, :channels]) and not first[:, channels:].any()


def test_the_first_codebook_of_a_group_of_several() -> None:
    quantizer = product(RESIDUAL)
    indices = quantizer(latents(quantizer.dim)).indices
    part = quantizer.lookup(indices[..., :3])  # a group and the first level of the second
    assert torch.equal(part[:, D : 2 * D], groups_of(quantizer)[1].lookup(indices[..., 2:3]))


def test_updates_reach_the_groups() -> None:
    quantizer = product(EMA | {"revive": 0.5}).train()
    quantizer(latents(G * D))
    before = [group.codebook.clone() for group in groups_of(quantizer)]
    log = quantizer.update()
    pairs = zip(groups_of(quantizer), before, strict=True)
    assert all(not torch.equal(group.codebook, codes) for group, codes in pairs)
    assert int(log["revived"]) == sum(int(log[f"revived/{g}"]) for g in range(G))


def test_the_log_has_every_group_and_their_mean() -> None:
    stats = product(VQ)(latents(G * D)).stats
    each = torch.stack([stats[f"perplexity/{g}"] for g in range(G)])
    assert len(set(each.tolist())) > 1
    torch.testing.assert_close(stats["perplexity"], each.log().mean().exp())
    torch.testing.assert_close(stats["batch_usage"], sum(stats[f"batch_usage/{g}"] for g in range(G)) / G)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": {"name": "vq", "dimm": 3}}, r"^model\.quantizer\.base\.dimm: unknown option.*Did you mean 'dim'"),
        (
            {"base": {"name": "multiscale", "sizes": [1, 1]}},
            r"^model\.quantizer\.base\.name=multiscale: its tokens have several scales",
        ),
        ({"base": VQ, "groups": 0}, r"groups=0: must be an integer from 1"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        build("quantizer", {"name": "product", **options})

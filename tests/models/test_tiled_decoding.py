"""Tiled decoding: the image of one pass, without visible seams."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.data.earth import world_maps
from vqf.models.tiled_decoding import GlobalGroupNorm, blend_ramp, decode_tiles, tile_starts
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.stage1 import Stage1


def enlarge(indices: Tensor) -> Tensor:
    """A decoder whose receptive field is one cell."""
    return indices.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].double()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_what_needs_no_neighbours_is_the_same_to_rounding(
    height: int, width: int, tile: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    indices = torch.randint(9, (2, height, width), generator=torch.Generator().manual_seed(0))
    images = decode_tiles(enlarge, indices, 4, tile, overlap)
    torch.testing.assert_close(images, enlarge(indices), rtol=1e-9, atol=1e-9)
    covered = [range(first, min(first + tile, height)) for first in tile_starts(height, tile, overlap)]
    assert sorted({row for each in covered for row in each}) == list(range(height))


def test_no_tile_is_larger_than_asked_for() -> None:
    seen: list[tuple[int, ...]] = []

    def decode(indices: Tensor) -> Tensor:
        seen.append(tuple(indices.shape[1:]))
        return enlarge(indices)

    decode_tiles(decode, torch.zeros(1, 23, 9, dtype=torch.long), 4, 8, 2)
    assert set(seen) == {(8, 8)} and len(seen) == 4 * 2


def test_two_neighbours_share_the_weight() -> None:
    first = blend_ramp(0, 8, 4, 12, 2, torch.zeros((), dtype=torch.float64))
    second = blend_ramp(4, 8, 4, 12, 2, torch.zeros((), dtype=torch.float64))
    assert (first[:8] == 1).all() and (second[8:] == 1).all()
    torch.testing.assert_close(first[8:] + second[:8], torch.ones(8, dtype=torch.float64), rtol=0, atol=3e-6)
    assert first[-1] < 1e-5 and second[0] < 1e-5  # the border of a tile, which lacks context, has no weight


def test_a_convolution_has_no_seam() -> None:
    """An overlap wider than the receptive field hides the seams; tiles without overlap show them."""
    torch.manual_seed(0)
    smooth = nn.Conv2d(1, 1, 5, padding=2).double()

    def decode(indices: Tensor) -> Tensor:
        return smooth(enlarge(indices))

    indices = torch.randint(9, (1, 20, 20))
    with torch.no_grad():
        untiled = decode(indices)
        torch.testing.assert_close(decode_tiles(decode, indices, 4, 12, 4), untiled, rtol=0, atol=1e-4)
        assert float((decode_tiles(decode, indices, 4, 12, 0) - untiled).abs().max()) > 0.1


def test_norms_see_the_whole() -> None:
    """One norm, and tiles that need no overlap: their joint statistics are those of the full image."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1)).double()
    nn.init.normal_(net[1].weight), nn.init.normal_(net[1].bias)  # type: ignore[arg-type]
    slope = torch.arange(24)[:, None] + torch.arange(16)  # every tile by itself has the same brightness

    def decode(indices: Tensor) -> Tensor:
        return net(enlarge(indices))

    norms = GlobalGroupNorm(net)
    with torch.no_grad(), norms.collecting():
        alone = decode_tiles(decode, slope[None], 4, 8, 0)
    with torch.no_grad(), norms.frozen():
        shared = decode_tiles(decode, slope[None], 4, 8, 0)
    with torch.no_grad():
        untiled = decode(slope[None])
    torch.testing.assert_close(shared, untiled, rtol=0, atol=1e-5)
    assert float((alone - untiled).abs().max()) > 0.1
    assert not net[1]._forward_hooks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


def trained(folder: Path, *words: str) -> Tokenizer:
    """A tokenizer trained until every norm matters."""
    sizes = ["model.encoder.channels=16", "model.decoder.channels=16", "model.quantizer.codebook_size=256"]
    several = ["image_size=64", "optimizer.lr=3e-3", "steps=250", "checkpoint.every=250", "log.every=50", *words]
    plain = ["model.discriminator=null", "model.adversary=null", "evaluate.count=4"]
    Stage1(compose(*TINY, "data=earth", "data.crops=512", *sizes, *several, *plain), folder).run()
    tokenizer = vqf.load(folder)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


def coast(tokenizer: Tokenizer, side: int = 56) -> tuple[Tensor, Tensor]:
    """Indices of a large crop of the earth, and its image decoded in one pass."""
    pixels = side * tokenizer.stride
    codes = tokenizer.encode(world_maps()[:3, 300 : 300 + pixels, 900 : 900 + pixels].float()[None] / 127.5 - 1)
    return codes, tokenizer.decode(codes)


LEVEL = 2 / 255  # one level of 8 bits, in [-1, 1]


@pytest.mark.slow
def test_tiles_of_a_trained_decoder_are_the_whole_to_a_level(folder: Path) -> None:
    """With attention and norms: no pixel is off by a level, and no step between tiles; without overlap there is one."""
    tokenizer = trained(folder)
    codes, untiled = coast(tokenizer)

    @torch.no_grad()
    def decode_without_tiles(indices: Tensor) -> Tensor:
        return tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.quantizer.lookup(indices)))

    tiled = tokenizer.decode(codes, tile=32)
    assert float((tiled - untiled).abs().max()) < LEVEL and jump(tiled - untiled) < LEVEL / 4
    own_norms = decode_tiles(decode_without_tiles, codes, tokenizer.stride, 32, 16).clamp(-1, 1)
    no_overlap = decode_tiles(decode_without_tiles, codes, tokenizer.stride, 32, 0).clamp(-1, 1)
    assert float((own_norms - untiled).abs().max()) > 20 * LEVEL and jump(own_norms - untiled) > 2 * LEVEL
    assert jump(no_overlap - untiled) > 10 * LEVEL
    assert torch.equal(tokenizer.decode(codes, tile=56), untiled)


def jump(error: Tensor) -> float:
    """The largest mean step from one column of pixels to the next: a visible seam."""
    return float((error[..., 1:] - error[..., :-1]).abs().mean((0, 1, 2)).max())


def test_tiles_that_do_not_get_ahead_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles of 8 cells cannot overlap by 8"):
        decode_tiles(enlarge, torch.zeros(1, 9, 9, dtype=torch.long), 4, 8, 8)

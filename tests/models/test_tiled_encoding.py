"""Tiled encoding: the codes of one pass, in tiles of bounded size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.models import tiled_encoding
from vqf.models.tiled_encoding import encode_tiled, encode_tiles, kept_cells, largest_tile
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.protocols import TiledEncoding


@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_every_cell_is_kept_once_far_from_borders(length: int, tile: int, data: st.DataObject) -> None:
    margin = data.draw(st.integers(0, (tile - 1) // 2))
    places = kept_cells(length, tile, margin).items()
    kept = [(start, start + cells.start, start + cells.stop) for start, cells in places]
    assert [cell for _, first, end in kept for cell in range(first, end)] == list(range(length))
    for start, first, end in kept:
        assert first == 0 or first - start >= margin
        assert end == length or start + tile - end >= margin


@given(st.integers(1, 20), st.integers(1, 20), st.integers(5, 9))
@settings(deadline=None, max_examples=30)
def test_what_sees_no_farther_than_the_margin_is_the_same(height: int, width: int, tile: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 2, 3, stride=2, padding=1)).double()  # 3 pixels
    images = torch.randn(2, 3, 2 * height, 2 * width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(encode_tiles(net, images, 2, tile, 2), net(images), rtol=0, atol=1e-12)
    if max(height, width) >= 2 * tile:
        with torch.no_grad():
            assert not torch.allclose(encode_tiles(net, images, 2, tile, 0), net(images))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    built = build_tokenizer(compose(*TINY).model, 16).double().eval()
    for norm in (module for module in built.encoder.modules() if isinstance(module, nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1, 0.5), nn.init.normal_(norm.bias, 0, 0.5)
    return built


@pytest.fixture(scope="module")
def image() -> Tensor:
    """Brighter to the right: tiles with statistics of their own would give other codes."""
    torch.manual_seed(0)
    noise = torch.randn(1, 3, 8 * 44, 8 * 23, dtype=torch.float64) / 4
    return (noise + torch.linspace(-1, 1, 8 * 23, dtype=torch.float64)).clamp(-1, 1)


def test_the_codes_are_those_of_one_pass(tokenizer: Tokenizer, image: Tensor) -> None:
    assert tokenizer.stride == 8 and isinstance(tokenizer.encoder, TiledEncoding)
    whole = tokenizer.encode(image)
    assert whole.unique().numel() > 4
    codes = encode_tiled(tokenizer, image, 20)
    assert codes.shape == whole.shape and float((codes == whole).double().mean()) > 0.99
    with torch.no_grad():
        alone = tokenizer.quantize_latents(encode_tiles(tokenizer.encoder, image, 8, 20, 0)).indices
    assert float((alone == whole).double().mean()) < 0.95


def test_an_image_of_one_tile_is_encoded_in_one_piece(tokenizer: Tokenizer, image: Tensor) -> None:
    assert torch.equal(encode_tiled(tokenizer, image, 44), tokenizer.encode(image))
    assert largest_tile(tokenizer) * tokenizer.stride == tiled_encoding.TILE_PIXELS


@pytest.mark.parametrize("cells", [0, 2**16])
def test_no_tile_is_larger_than_asked_for(
    tokenizer: Tokenizer, image: Tensor, monkeypatch: pytest.MonkeyPatch, cells: int
) -> None:
    seen: set[tuple[int, ...]] = set()
    first = next(module for module in tokenizer.encoder.modules() if isinstance(module, nn.Conv2d))
    handle = first.register_forward_hook(lambda _, inputs, output: seen.add(tuple(output.shape[2:])))
    monkeypatch.setattr(tiled_encoding, "MAX_GLOBAL_CELLS", cells)
    codes = encode_tiled(tokenizer, image, 36)
    handle.remove()
    assert codes.shape == (1, 44, 23)
    assert seen == {(36 * 2, 23 * 2)}  # of patches of 4 pixels


def test_a_wrong_shape_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"multiples of the encoder's stride 8, not 401 x 8"):
        encode_tiled(tokenizer, torch.zeros(1, 3, 401, 8).double(), 20)

"""Conditioners of images: condition maps, low-resolution views and edges, and coordinates."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from tests.support.layouts import raster
from vqf.batch import Batch
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.registry import RegistryError, build
from vqf.transformers.conditioners.spatial import sobel_edges


class FakeCodec:
    """A tokenizer whose index is the red of a cell's first pixel."""

    channels = 3

    def __init__(self, stride: int = 2) -> None:
        self.stride, self.layout = stride, raster((8 // stride, 12 // stride), 11, stride)

    def encode(self, images: Tensor) -> Tensor:
        return (images[:, 0, :: self.stride, :: self.stride] * 10).round().long()

    def decode(self, indices: Tensor) -> Tensor:
        large = indices.repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)
        return large[:, None].expand(-1, 3, -1, -1) / 10

    def to_rgb(self, images: Tensor) -> Tensor:
        return 1 - images  # colors of its own


def conditioner(name: str, grid: tuple[int, int] = (4, 6), stride: int = 2, **options: Any) -> Any:
    opened: dict[str, FakeCodec] = {"maps": FakeCodec(stride)}
    node = {"name": name, **({"run": "maps"} if name == "spatial" else {}), **options}
    wired = {"layout": raster(grid, 7, 2), "tokenizer": FakeCodec(2), "open_tokenizer": opened.__getitem__}
    return build("conditioner", node, num_classes=3, **wired).eval()


def maps(batch: int = 2, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    numbers = torch.randint(11, (batch, 1, height, width), generator=torch.Generator().manual_seed(seed))
    return (numbers / 10).expand(-1, 3, -1, -1)


def test_the_codes_of_the_map_stand_row_by_row() -> None:
    spatial, batch = conditioner("spatial"), Batch(conditions=maps())
    assert (spatial.length, spatial.vocab_size, spatial.channels) == (24, 11, 3)
    expected = [
        [round(float(batch.conditions[b, 0, 2 * i, 2 * j]) * 10) for i in range(4) for j in range(6)] for b in range(2)
    ]
    assert spatial(batch).tolist() == expected
    assert torch.equal(spatial.render(spatial.prepare(batch))[:, 0, ::2, ::2], 1 - batch.conditions[:, 0, ::2, ::2])
    assert torch.equal(spatial.show(batch.conditions), 1 - batch.conditions)


@pytest.mark.parametrize(("stride", "downsample", "length"), [(2, 1, 24), (4, 1, 6), (1, 2, 24), (2, 2, 6)])
def test_maps_may_have_fewer_codes_than_images(stride: int, downsample: int, length: int) -> None:
    spatial = conditioner("spatial", stride=stride, downsample=downsample)
    assert spatial.length == length
    prefix = spatial(Batch(conditions=maps()))
    step = stride * downsample
    expected = (maps()[:, 0, ::step, ::step] * 10).round().long().flatten(1)  # nearest takes the first pixel of a cell
    assert torch.equal(prefix, expected)


@pytest.mark.parametrize(("stride", "downsample"), [(2, 1), (4, 1), (1, 1), (2, 2)])
def test_a_code_of_a_map_stands_in_the_middle_of_what_it_covers(stride: int, downsample: int) -> None:
    positions = conditioner("spatial", stride=stride, downsample=downsample).positions
    step = stride * downsample
    for (row, column), (top, left) in zip(
        positions, itertools.product(range(0, 8, step), range(0, 12, step)), strict=True
    ):
        middle = (top + (step - 1) / 2, left + (step - 1) / 2)  # of its pixels
        assert (row * 2 + 0.5, column * 2 + 0.5) == middle  # cell k of the image covers the pixels 2 k and 2 k + 1


def test_places_of_several_conditions_stand_in_the_order_of_their_tokens() -> None:
    label = build("conditioner", {"name": "label"}, num_classes=3)
    stack = ConditionerStack(
        {"coordinates": conditioner("coordinates"), "label": label, "image": conditioner("image", factor=2)}
    )
    grid = [(i, j) for i in range(4) for j in range(6)]
    assert stack.spec.positions == [*grid, None, *((2 * i + 0.5, 2 * j + 0.5) for i in range(2) for j in range(3))]
    assert len(stack.spec.positions) == stack.spec.length


def test_a_window_gets_its_crop_of_a_map() -> None:
    """The indices of the full map, cropped; encoding the window by itself would differ with a real encoder."""
    stack = ConditionerStack({"spatial": conditioner("spatial")}).eval()
    large = maps(1, 20, 28)
    prepared = stack.prepare(Batch(conditions=large))
    indices = prepared.condition_indices["spatial"][0]
    for top in range(10 - 4 + 1):
        for left in range(14 - 6 + 1):
            prefix = stack(prepared.window((top, left), (4, 6), (10, 14)))
            assert torch.equal(prefix.ids[0], indices[top : top + 4, left : left + 6].flatten())


@pytest.mark.parametrize(("stride", "downsample"), [(4, 1), (8, 1), (2, 2), (1, 1), (2, 1)])
def test_a_window_gets_shifted_maps_of_any_stride_exactly(stride: int, downsample: int) -> None:
    """The map from the window's first pixel on, not from the next cell of the map."""
    stack = ConditionerStack({"spatial": conditioner("spatial", (4, 8), stride, downsample=downsample)}).eval()
    large, step = maps(1, 24, 32), stride * downsample
    prepared = stack.prepare(Batch(conditions=large), shifted=True)
    for top in range(12 - 4 + 1):
        for left in range(16 - 8 + 1):
            prefix = stack(prepared.window((top, left), (4, 8), (12, 16)))
            part = large[:, 0, 2 * top : 2 * top + 8 : step, 2 * left : 2 * left + 16 : step]
            assert torch.equal(prefix.ids, (part * 10).round().long().flatten(1))


def test_the_windows_of_a_low_resolution_image_are_its_own() -> None:
    stack = ConditionerStack({"image": conditioner("image", factor=2)}).eval()
    large = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    prepared = stack.prepare(Batch(images=large), shifted=True)
    for top, left in itertools.product(range(7), range(9)):
        part = large[..., 2 * top : 2 * top + 8, 2 * left : 2 * left + 12]
        prefix = stack(prepared.window((top, left), (4, 6), (10, 14)))
        assert torch.equal(prefix.ids, stack(Batch(images=part)).ids)


def test_indices_without_shifts_are_cropped_at_the_nearest_cell() -> None:
    stack = ConditionerStack({"spatial": conditioner("spatial", (4, 8), stride=8)}).eval()
    prepared = stack.prepare(Batch(conditions=maps(1, 32, 64)))
    indices = prepared.condition_indices["spatial"][0]
    for top, left in itertools.product(range(13), range(25)):
        row, column = math.floor(top / 4 + 0.5), math.floor(left / 4 + 0.5)
        prefix = stack(prepared.window((top, left), (4, 8), (16, 32)))
        assert torch.equal(prefix.ids[0], indices[row : row + 1, column : column + 2].flatten())


def test_coordinates_count_rows_and_columns_of_the_whole_image() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.25, 0.75, 0.5]])
    bins = conditioner("coordinates", rows=8, columns=5)(Batch(crop_boxes=boxes)).unflatten(1, (4, 6))
    for b, (top, left, bottom, right) in enumerate(boxes.tolist()):
        for i in range(4):
            for j in range(6):
                y, x = top + (bottom - top) * (i + 0.5) / 4, left + (right - left) * (j + 0.5) / 6
                assert bins[b, i, j] == int(y * 8) * 5 + int(x * 5)


def test_the_windows_of_an_image_are_told_what_the_image_is_told() -> None:
    """In every window a token has the coordinates that it has in the full image."""
    full = conditioner("coordinates", grid=(10, 14), rows=20, columns=30)(Batch(labels=torch.zeros(1))).unflatten(
        1, (10, 14)
    )
    here = conditioner("coordinates", rows=20, columns=30)
    for top in range(7):
        for left in range(9):
            window = here(Batch(labels=torch.zeros(1)).window((top, left), (4, 6), (10, 14)))
            assert torch.equal(window[0], full[0, top : top + 4, left : left + 6].flatten())


def test_without_a_crop_box_an_image_is_a_full_one() -> None:
    coordinates = conditioner("coordinates")
    assert torch.equal(
        coordinates(Batch(labels=torch.zeros(1))), coordinates(Batch(crop_boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]])))
    )
    beyond = coordinates(Batch(crop_boxes=torch.tensor([[0.5, 0.5, 1.5, 1.5]])))  # as in a map that wraps around
    assert beyond.max() == 32 * 32 - 1


def test_a_low_resolution_image_is_the_mean_of_its_cells() -> None:
    image = conditioner("image", factor=2)
    assert image.length == 6
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    small = images.unflatten(3, (6, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(image.make_view(images), small)
    assert torch.equal(image(Batch(images=images)), FakeCodec(2).encode(small).flatten(1))
    assert image.render(image.prepare(Batch(images=images))).shape == images.shape


def test_edges_are_those_of_the_sobel_operator() -> None:
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    grey = images.mean(1).numpy()
    across, down = (np.stack([ndimage.sobel(each, axis, mode="nearest") for each in grey]) / 8 for axis in (1, 0))
    expected = np.hypot(across, down).clip(max=1) * 2 - 1
    edges = sobel_edges(images)
    assert edges.shape == images.shape
    for channel in range(3):
        np.testing.assert_allclose(edges[:, channel].numpy(), expected, atol=1e-12)
    assert (sobel_edges(torch.full((1, 3, 5, 5), 0.3)) == -1).all()


@pytest.mark.parametrize("name", ["spatial", "image"])
def test_what_training_hides_is_hidden_whole_and_named_by_null(name: str) -> None:
    tokenized = conditioner(name, dropout=0.3, **({"factor": 1} if name == "image" else {}))
    batch = Batch(conditions=maps(4000), images=maps(4000))
    plain, null = tokenized(batch), tokenized.null_prefix(batch)
    assert tokenized.vocab_size == 12 and (null == 11).all() and null.shape == plain.shape
    torch.manual_seed(0)
    hidden = ConditionerStack({name: tokenized}).train()(batch).ids
    without = (hidden == 11).all(1)
    assert float(without.double().mean()) == pytest.approx(0.3, abs=5 * (0.21 / 4000) ** 0.5)
    assert torch.equal(hidden[~without], plain[~without])
    assert conditioner(name, **({"factor": 1} if name == "image" else {})).null_prefix(batch) is None


def test_conditions_in_a_list_have_ids_of_their_own() -> None:
    label = build("conditioner", {"name": "label", "dropout": 0.5}, num_classes=3).eval()
    parts = {
        "label": label,
        "spatial": conditioner("spatial"),
        "coordinates": conditioner("coordinates", rows=4, columns=4),
    }
    both = ConditionerStack(parts).eval()
    assert (both.spec.length, both.spec.vocab_size) == (1 + 24 + 24, 4 + 11 + 16)
    batch = Batch(labels=torch.tensor([2, 0]), conditions=maps())
    expected = [label(batch), parts["spatial"](batch) + 4, parts["coordinates"](batch) + 15]
    assert torch.equal(both(batch).ids, torch.cat(expected, 1))
    assert torch.equal(
        both.null_prefix(batch).ids, torch.cat([label.null_prefix(batch), *expected[1:]], 1)
    )  # only the label can be dropped
    assert set(both.render(both.prepare(batch))) == {"spatial"}
    assert ConditionerStack({"spatial": parts["spatial"]}).null_prefix(batch) is None


def test_a_batch_keeps_what_was_prepared() -> None:
    stack = ConditionerStack({"spatial": conditioner("spatial")}).eval()
    batch = replace(stack.prepare(Batch(conditions=maps(4))), conditions=None)
    assert len(batch) == 4
    assert torch.equal(torch.cat([stack(each).ids for each in batch.chunk(2)]), stack(batch).ids)
    assert batch.to("meta").condition_indices["spatial"].device.type == "meta"


def mistakes() -> list[Any]:
    return [
        (
            lambda: build("conditioner", {"name": "spatial"}, layout=raster((4, 6), 7, 2), open_tokenizer=FakeCodec),
            "give the run of",
        ),
        (lambda: conditioner("spatial", downsample=3), "does not divide into cells of 6 pixels"),
        (lambda: conditioner("spatial")(Batch(labels=torch.zeros(2))), "the data has no condition maps"),
        (lambda: conditioner("image", factor=1)(Batch(labels=torch.zeros(2))), "needs an image"),
        (lambda: conditioner("spatial")(Batch(conditions=maps(1, 8, 8))), "16 tokens, the prior was trained with 24"),
    ]


@pytest.mark.parametrize("index", range(len(mistakes())))
def test_mistakes_take_one_line(index: int) -> None:
    action, words = mistakes()[index]
    with pytest.raises((UserError, RegistryError), match=words) as caught:
        action()
    assert "\n" not in str(caught.value)

"""Crop boxes as conditions: those of sampled windows are like those of training."""

import pytest
import torch

import vqf
from tests.pipelines.test_conditions import EARTH, FULL
from tests.support.composing import compose
from vqf.batch import Batch
from vqf.data.earth import FIRST_ROW, LAST_ROW, WIDTH
from vqf.models.generator import Generator
from vqf.pipelines.full import Full
from vqf.registry import build


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("boxes")
    words = [each for each in FULL if not each.startswith("model/conditioner")]
    Full(compose(*words, "model/conditioner=[spatial,coordinates]", "data.scale=1"), folder).run()
    loaded = vqf.load(folder)
    assert isinstance(loaded, Generator)
    return loaded


def crop_boxes_seen(
    generator: Generator, conditions: Batch | torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Sample an image; return the crop boxes (windows, 4) that the prior reads, in the order of first use."""
    seen: dict[tuple[float, ...], None] = {}
    coordinates = generator.conditioner.conditioners["coordinates"]
    read = type(coordinates).forward

    def recording(self: torch.nn.Module, batch: Batch) -> torch.Tensor:
        assert batch.crop_boxes is not None
        seen.update(dict.fromkeys(map(tuple, batch.crop_boxes.tolist())))
        return read(self, batch)

    monkeypatch.setattr(type(coordinates), "forward", recording)
    generator.sample(1, conditions=conditions)
    return torch.tensor(list(seen))


def test_a_checkpoint_stores_the_mean_crop_extent(generator: Generator) -> None:
    expected = [16 / (LAST_ROW - FIRST_ROW), 16 / WIDTH]
    assert generator.crop_extent == pytest.approx(expected)
    train = build("data", compose(*EARTH).data, image_size=(16, 16), seed=0).split("train")
    for index in range(5):
        box = train.item(0, index).crop_box
        assert box is not None
        assert (box[2:] - box[:2]).abs().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (160, 16)])
def test_windows_of_a_map_have_crop_boxes_as_large_as_in_training(
    generator: Generator, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They span the full image, whatever its size; a single window lies in the middle."""
    boxes = crop_boxes_seen(generator, torch.rand(3, *size) * 2 - 1, monkeypatch)
    extent = torch.tensor(generator.crop_extent)
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], extent.expand(len(boxes), 2), rtol=0, atol=1e-5)
    for side in (0, 1):
        ends = [float(boxes[:, side].min()), float(boxes[:, side + 2].max())]
        middle = float(extent[side]) / 2
        assert ends == pytest.approx([0, 1] if size[side] > 16 else [0.5 - middle, 0.5 + middle], abs=1e-5)


def test_windows_of_a_map_with_a_crop_box_divide_that_box(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = torch.tensor([[0.2, 0.1, 0.6, 0.3]])
    boxes = crop_boxes_seen(generator, Batch(conditions=torch.rand(1, 3, 40, 32), crop_boxes=box), monkeypatch)
    assert [float(boxes[:, i].min()) for i in (0, 1)] == pytest.approx([0.2, 0.1])
    assert [float(boxes[:, i].max()) for i in (2, 3)] == pytest.approx([0.6, 0.3])
    torch.testing.assert_close(boxes[:, 2] - boxes[:, 0], torch.full((len(boxes),), 0.4 * 16 / 40))

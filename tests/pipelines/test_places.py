"""Where images are told to lie: what a prior is told in sampling is of the kind that it was told in training."""

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
    folder = tmp_path_factory.mktemp("places")
    words = [each for each in FULL if not each.startswith("model/conditioner")]
    Full(compose(*words, "model/conditioner=[spatial,coordinates]", "data.scale=1"), folder).run()
    found = vqf.load(folder)
    assert isinstance(found, Generator)
    return found


def told(generator: Generator, conditions: Batch | torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The places (windows, 4) that the prior is told of, in the order of first use, while an image is drawn."""
    seen: dict[tuple[float, ...], None] = {}
    coordinates = generator.conditioner.conditioners["coordinates"]
    read = type(coordinates).forward

    def noting(self: torch.nn.Module, batch: Batch) -> torch.Tensor:
        assert batch.crop_boxes is not None
        seen.update(dict.fromkeys(map(tuple, batch.crop_boxes.tolist())))
        return read(self, batch)

    monkeypatch.setattr(type(coordinates), "forward", noting)
    generator.sample(1, conditions=conditions)
    return torch.tensor(list(seen))


def test_a_checkpoint_keeps_how_large_training_images_were(generator: Generator) -> None:
    expected = [16 / (LAST_ROW - FIRST_ROW), 16 / WIDTH]
    assert generator.crop_extent == pytest.approx(expected)
    train = build("data", compose(*EARTH).data, image_size=(16, 16), seed=0).split("train")
    for index in range(5):
        place = train.item(0, index).crop_box
        assert place is not None
        assert (place[2:] - place[:2]).abs().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (160, 16)])
def test_windows_of_a_drawn_map_are_told_places_as_large_as_in_training(
    generator: Generator, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one end of the world to the other, whatever the size; in the middle where one window is all."""
    places = told(generator, torch.rand(3, *size) * 2 - 1, monkeypatch)
    extent = torch.tensor(generator.crop_extent)
    torch.testing.assert_close(places[:, 2:] - places[:, :2], extent.expand(len(places), 2), rtol=0, atol=1e-5)
    for side in (0, 1):
        ends = [float(places[:, side].min()), float(places[:, side + 2].max())]
        middle = float(extent[side]) / 2
        assert ends == pytest.approx([0, 1] if size[side] > 16 else [0.5 - middle, 0.5 + middle], abs=1e-5)


def test_windows_of_a_map_whose_place_is_known_are_told_their_part_of_it(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = torch.tensor([[0.2, 0.1, 0.6, 0.3]])
    places = told(generator, Batch(conditions=torch.rand(1, 3, 40, 32), crop_boxes=place), monkeypatch)
    assert [float(places[:, i].min()) for i in (0, 1)] == pytest.approx([0.2, 0.1])
    assert [float(places[:, i].max()) for i in (2, 3)] == pytest.approx([0.6, 0.3])
    torch.testing.assert_close(places[:, 2] - places[:, 0], torch.full((len(places),), 0.4 * 16 / 40))

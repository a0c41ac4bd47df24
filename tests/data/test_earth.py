"""The earth: every pixel of a crop is traced back to where it was taken from."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqf.batch import Sample
from vqf.data import earth
from vqf.data.earth import (
    ASSETS,
    FIRST_ROW,
    HEIGHT,
    LAST_ROW,
    WATER_COLOR,
    WIDTH,
    Earth,
    MapCrop,
    render_crop,
    render_map,
    world_maps,
)
from vqf.errors import UserError

SIZES = st.one_of(st.integers(8, 200), st.tuples(st.integers(8, 767), st.integers(8, 228)))
MAPS = Path(__file__).parents[2] / "examples" / "maps"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planet whose colors encode position: the column in red and green, the row in blue and elevation."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    water = world_maps()[4].numpy()
    channels = np.stack([columns // 256, columns % 256, rows // 256, rows % 256, water]).astype(np.uint8)
    monkeypatch.setattr(earth, "world_maps", lambda: torch.from_numpy(channels))


def origin(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of every pixel of a crop of the traced planet that was not scaled."""
    high, low, row, *_ = ((sample.image.double() + 1) * 127.5).round().long().numpy()
    return row, high * 256 + low


def east(columns: np.ndarray) -> np.ndarray:
    """Degrees east, in [0, 360), of the middle of columns."""
    return ((columns + 0.5) / WIDTH * 360 - 180) % 360


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=SIZES, seed=st.integers(0, 2**32), epoch=st.integers(0, 10**6), index=st.integers(0, 4095), data=st.data())
def test_no_training_crop_reaches_into_the_band_and_no_validation_crop_out_of_it(
    traced: None, size: int | tuple[int, int], seed: int, epoch: int, index: int, data: st.DataObject
) -> None:
    source = Earth(size, seed)
    validation = source.split("validation")
    learned, held_out = (
        source.split("train").item(epoch, index),
        validation.item(epoch, data.draw(st.integers(0, len(validation) - 1))),
    )
    degrees = east(origin(learned)[1])
    assert not ((degrees > 60) & (degrees < 100)).any()
    degrees = east(origin(held_out)[1])
    assert ((degrees > 60) & (degrees < 100)).all()
    for sample in (learned, held_out):
        assert 0 <= sample.crop_box[0] < sample.crop_box[2] <= 1  # from 75 N to 60 S


@pytest.mark.parametrize("band", [(60, 240), (160, 340), (-180, 0), (200.2, 380.2)])
def test_training_and_validation_share_no_column_and_leave_none_out(traced: None, band: tuple[float, float]) -> None:
    """With half the earth for each split, a crop of that width shows all of it."""
    source = Earth((8, WIDTH // 2), 3, band=band)
    train, validation = source.split("train"), source.split("validation")
    learned = {column for index in range(10) for column in origin(train.item(0, index))[1][0]}
    held_out = {column for index in range(len(validation)) for column in origin(validation.item(0, index))[1][0]}
    assert learned.isdisjoint(held_out) and learned | held_out == set(range(WIDTH))
    inside = (east(np.array(sorted(held_out))) - band[0]) % 360
    assert ((inside < 180) | (inside > 359.9)).all()  # a column on the border is on one side


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_scaled_crops_keep_to_their_split(zoom: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the band in white and everything else in black, no training crop holds a trace of white, nor the reverse."""
    pixels = torch.zeros(5, HEIGHT, WIDTH, dtype=torch.uint8)
    pixels[:, :, round(240 / 360 * WIDTH) : round(280 / 360 * WIDTH)] = 255
    monkeypatch.setattr(earth, "world_maps", lambda: pixels)
    source = Earth(64, 0, zoom=zoom, scale=1.4, land=0)
    train, validation = source.split("train"), source.split("validation")
    assert all((train.item(1, i).image < -1 + 1e-5).all() for i in range(200))
    assert all((validation.item(1, i).image > 1 - 1e-5).all() for i in range(len(validation)))


@pytest.mark.parametrize("left", [0, 1500, WIDTH - 64, WIDTH - 63, WIDTH - 20, WIDTH - 1, WIDTH, WIDTH + 700])
def test_crops_wrap_round_in_longitude(left: int) -> None:
    image = render_crop(MapCrop(200, left, 48, 64), (48, 64)).image
    pixels = np.asarray(Image.open(ASSETS / "earth-2048.jpg"))
    expected = np.empty((3, 48, 64))
    for y in range(48):
        for x in range(64):
            expected[:, y, x] = pixels[200 + y, (left + x) % WIDTH] / 127.5 - 1
    torch.testing.assert_close(image.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_some_training_crops_cross_the_edge_of_the_map(traced: None) -> None:
    split = Earth(64, 0).split("train")
    jumps = [np.abs(np.diff(origin(split.item(0, i))[1][0])).max() > 1 for i in range(300)]
    assert 2 < sum(jumps) < 30  # 64 of 1756 places


def test_latitudes_reach_from_75_north_to_60_south() -> None:
    """The tallest crop that fits is a pixel short of them at most; one row more does not fit."""
    place = Earth((767, 8), 0).split("train").item(0, 0).crop_box
    north, south = (90 - 180 * (FIRST_ROW + float(share) * (LAST_ROW - FIRST_ROW)) / HEIGHT for share in place[[0, 2]])
    assert 75 - 360 / HEIGHT < north <= 75 and -60 <= south + 1e-4 and south < -60 + 360 / HEIGHT
    with pytest.raises(ValueError, match="a crop shows 768 x 8 pixels"):
        Earth((768, 8), 0)


def test_the_crop_box_is_where_the_crop_was_taken(traced: None) -> None:
    split = Earth((32, 48), 5).split("train")
    mirrored = 0
    for index in range(100):
        sample = split.item(2, index)
        top, left, bottom, right = sample.crop_box.double().tolist()
        _, columns = origin(sample)
        first, last = (columns[0, 0], columns[0, -1])
        assert (bottom - top) * (LAST_ROW - FIRST_ROW) == pytest.approx(32, abs=1e-3)
        if left < right:
            assert left * WIDTH == pytest.approx(first, abs=1e-3)
            assert (right * WIDTH - 1) % WIDTH == pytest.approx(last, abs=1e-3)
        else:
            mirrored += 1
            assert right * WIDTH == pytest.approx(last, abs=1e-3)
            assert (left * WIDTH - 1) % WIDTH == pytest.approx(first, abs=1e-3)
    assert 30 < mirrored < 70


def test_map_and_image_are_aligned(traced: None) -> None:
    """The map's grey is the root of the row's low byte, the image's blue is the row's high byte."""
    splits = [Earth(48, 1).split(name) for name in ("train", "validation")]
    for sample in (split.item(0, index) for split in splits for index in range(12)):  # some of them mirrored
        top = FIRST_ROW + round(float(sample.crop_box[0]) * (LAST_ROW - FIRST_ROW))
        columns = origin(sample)[1][0]
        water = planet_water()[top : top + 48][:, columns] >= 128
        rows = np.arange(top, top + 48)[:, None].repeat(48, 1)
        grey = np.sqrt(rows % 256 / 255) * 2 - 1
        expected = np.where(water, np.array([-1, -1, 1])[:, None, None], grey[None])
        torch.testing.assert_close(sample.condition.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def planet_water() -> np.ndarray:
    return np.asarray(Image.open(ASSETS / "water-2048.png"))


@pytest.mark.parametrize("axis", [1, 2])
def test_the_shipped_maps_lie_on_each_other(axis: int) -> None:
    """Water is bluer than land, mountains are whiter than plains, and both most so where no map is shifted."""
    red, _, blue, elevation, water = world_maps()[:, 200:800].double()

    def contrast(shift: int) -> float:
        wet = water.roll(shift, axis - 1) >= 128
        return float((blue - red)[wet].mean() - (blue - red)[~wet].mean())

    def height_at_sea(shift: int) -> float:
        return float(elevation.roll(shift, axis - 1)[water >= 128].mean())

    shifts = range(-4, 5)
    assert max(shifts, key=contrast) == 0 and contrast(0) > 50
    assert abs(min(shifts, key=height_at_sea)) <= 1


@pytest.mark.parametrize("options", [{}, {"zoom": 0.4, "scale": 1.3}, {"zoom": 3.0}])
def test_maps_hold_greys_and_one_blue_only(options: dict[str, float]) -> None:
    split = Earth(40, 0, **options).split("train")
    for index in range(30):
        sample = split.item(0, index)
        assert sample.image.shape == sample.condition.shape == (3, 40, 40) and sample.label is None
        for image in (sample.image, sample.condition):
            assert -1 <= image.min() and image.max() <= 1
        red, green, blue = sample.condition
        water = (red == -1) & (green == -1) & (blue == 1)
        assert torch.equal(red[~water], green[~water]) and torch.equal(red[~water], blue[~water])


def test_a_map_is_drawn_by_the_rule() -> None:
    elevation, water = torch.tensor([[0.0, 0.25, 1.0]]), torch.tensor([[0.0, 0.4, 0.51]])
    expected = torch.tensor([[-1.0, 0.0, -1.0], [-1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])[:, None]
    torch.testing.assert_close(render_map(elevation, water), expected)


@pytest.mark.parametrize("land", [0.0, 0.5, 1.0])
def test_land_is_the_share_of_crops_centred_on_it(land: float) -> None:
    split = Earth(33, 0, land=land).split("train")
    water = tuple(value / 127.5 - 1 for value in WATER_COLOR)
    inland = np.mean([tuple(split.item(0, i).condition[:, 16, 16].tolist()) != water for i in range(600)])
    elsewhere = 0.3  # share of land, measured on the water map between 60 S and 75 N
    assert inland == pytest.approx(land + (1 - land) * elsewhere, abs=0.06)


def test_a_crop_is_a_function_of_seed_epoch_and_index() -> None:
    def image(seed: int, epoch: int, index: int) -> Tensor:
        return Earth(32, seed, scale=1.2).split("train").item(epoch, index).image

    assert torch.equal(image(1, 2, 3), image(1, 2, 3))
    others = [image(*key) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


def test_validation_is_the_same_for_every_seed_and_epoch_and_covers_the_band(traced: None) -> None:
    first, second = (Earth(64, seed, flip=True, scale=1.3).split("validation") for seed in (0, 1))
    assert len(first) == len(second)
    assert all(torch.equal(first.item(0, i).image, second.item(9, i).image) for i in range(0, len(first), 10))
    seen = np.zeros(WIDTH, bool)
    for index in range(len(first)):
        seen[origin(first.item(0, index))[1]] = True
    assert seen.sum() == round(280 / 360 * WIDTH) - round(240 / 360 * WIDTH)


class Items(Dataset):
    """Training crops for a loader."""

    def __init__(self, workers: int) -> None:
        self.split = Earth(16, 4).split("train")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.split.item(1, index)
        return {"image": sample.image, "condition": sample.condition, "crop_box": sample.crop_box}


def test_workers_see_the_same_crops() -> None:
    alone, together = (list(loaded(workers)) for workers in (0, 2))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def loaded(workers: int) -> Iterator[dict[str, Tensor]]:
    return iter(DataLoader(Items(workers), batch_size=4, num_workers=workers))


def test_the_fingerprint_follows_what_is_seen() -> None:
    def fingerprint(name: str = "train", seed: int = 0, size: int = 32, **options: float) -> str:
        return Earth(size, seed, **options).split(name).fingerprint

    changed = [{"zoom": 0.5}, {"scale": 1.1}, {"land": 0.2}, {"flip": False}, {"crops": 9}, {"band": (0, 40)}]
    every = [fingerprint(), fingerprint(seed=1), fingerprint(size=64), fingerprint("validation")]
    every += [fingerprint(**options) for options in changed]
    assert len(set(every)) == len(every)
    assert fingerprint("validation") == fingerprint("validation", seed=1, scale=1.2, land=1.0, flip=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"band": (100, 60)}, r"^band=\[100\.0, 60\.0\] is not two meridians, the western one first"),
        ({"band": (0, 360)}, r"^band=\[0\.0, 360\.0\] is not two meridians"),
        ({"zoom": 0.25}, r"^a crop shows 256 x 256 pixels of the map, more than the 767 x 228 of the validation band;"),
        ({"scale": 13.0}, r"^a crop shows 832 x 832 pixels of the map, more than the 767 x 1820 of the rest of the"),
    ],
)
def test_mistakes_are_worded(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Earth(64, 0, **options)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UserError, match=r"^unknown split 'test'"):
        Earth(64, 0).split("test")


def test_licence_and_notice_lie_beside_the_maps() -> None:
    assert "MIT License" in (ASSETS / "LICENSE").read_text()
    notice = (ASSETS / "NOTICE").read_text()
    assert "three-globe 2.45.2" in notice and all(name in notice for name in earth.FILES)


@pytest.mark.parametrize(("name", "size"), [("archipelago", (256, 256)), ("coast", (192, 448))])
def test_the_drawn_maps_keep_the_rule(name: str, size: tuple[int, int]) -> None:
    with Image.open(MAPS / f"{name}.png") as image:
        assert image.mode == "RGB"
        pixels = np.asarray(image)
    assert pixels.shape[:2] == size and not any(side % 32 for side in size)
    water = (pixels == WATER_COLOR).all(-1)
    assert 0.2 < water.mean() < 0.8
    land = pixels[~water]
    assert (land == land[:, :1]).all() and land.max() > 230 and land.min() < 40

"""Preprocessing: crops against torchvision's and ADM's, rounding against arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from vqf.errors import UserError
from vqf.evaluation.preprocessing import adm_center_crop, center_crop, crop_split, round_to_8bit, to_uint8
from vqf.registry import build


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((width, height))


@pytest.mark.parametrize(
    ("width", "height"), [(200, 140), (141, 300), (96, 96), (60, 50), (67, 64), (64, 69), (147, 49)]
)
@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos", "box"])
def test_center_is_torchvisions_resize_and_center_crop(width: int, height: int, name: str) -> None:
    expected = Compose([Resize(64, InterpolationMode(name)), CenterCrop(64)])(photo(width, height))
    assert np.array_equal(np.array(center_crop(photo(width, height), (64, 64), name)), np.array(expected))


def published(image: Image.Image, size: int) -> np.ndarray:
    """ADM's center_crop_arr, as its text describes it."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(500, 333), (96, 200), (64, 64), (50, 70), (257, 128)])
def test_adm_is_guided_diffusions_crop(width: int, height: int) -> None:
    assert np.array_equal(
        np.array(adm_center_crop(photo(width, height), (64, 64))), published(photo(width, height), 64)
    )


def test_linear_looks_at_the_four_nearest_pixels_however_many_there_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    found = np.array(center_crop(Image.fromarray(pixels), (8, 8), "linear"))
    # The middle of a pixel of the result is where four of these meet: 5 i + 2.
    assert np.array_equal(found, pixels[2::5, 2::5])
    assert not np.array_equal(found, np.array(center_crop(Image.fromarray(pixels), (8, 8), "bilinear")))


def test_oblong_sizes_are_covered_whole() -> None:
    found = center_crop(photo(100, 100), (32, 64), "bicubic")
    assert found.size == (64, 32)
    assert np.array_equal(np.array(found), np.array(photo(100, 100).resize((64, 64)))[16:48])


@given(st.integers(0, 255))
def test_pixels_stay_what_they_are_to_the_nearest(level: int) -> None:
    exact = torch.full((1, 3, 2, 2), float(level)) / 127.5 - 1
    assert (to_uint8(exact) == level).all()
    assert torch.equal(round_to_8bit(exact, "nearest"), exact)


def test_rounding_by_hand() -> None:
    levels = torch.tensor([-3.0, 0.0, 0.4, 0.6, 99.99, 100.01, 254.4, 254.9, 300.0]).view(1, 1, 3, 3)
    images = levels / 127.5 - 1
    nearest, cut = (to_uint8(images.clamp(-1, 1), each).flatten().tolist() for each in ("nearest", "truncate"))
    assert nearest == [0, 0, 0, 1, 100, 100, 254, 255, 255]
    assert cut == [0, 0, 0, 0, 99, 100, 254, 254, 255]
    assert torch.equal(round_to_8bit(images, "none"), images.clamp(-1, 1))
    for each in ("nearest", "truncate"):
        again = to_uint8(round_to_8bit(images, each))
        assert torch.equal(again, to_uint8(images.clamp(-1, 1), each)), "what a network rounds again stays"


def folder(path: Path) -> Path:
    for i in range(6):
        place = path / f"class{i % 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        photo(90 + 7 * i, 80).save(place)
    return path


def test_a_split_is_cropped_without_any_variation_and_keeps_its_labels(tmp_path: Path) -> None:
    data = build("data", {"name": "folder", "root": str(folder(tmp_path))}, image_size=32, seed=0)
    plain = data.split("train")
    split = crop_split(plain, (32, 32), "center", "bicubic")
    assert crop_split(plain, (32, 32), "source", "bicubic") is plain
    assert len(split) == len(plain) > 2
    for i in range(len(split)):
        image = Image.open(tmp_path / plain.names[i])
        expected = np.array(center_crop(image, (32, 32), "bicubic")) / 127.5 - 1
        for epoch in (0, 5):
            sample = split.item(epoch, i)
            np.testing.assert_allclose(sample.image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
            assert sample.label == plain.item(epoch, i).label


def test_nothing_takes_the_place_of_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    data = build("data", {"name": "folder", "root": str(folder(tmp_path))}, image_size=32, seed=0)
    split = crop_split(data.split("train"), (32, 32), "adm", "bicubic")
    (tmp_path / data.split("train").names[1]).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot evaluate on 'class"):
        split.item(0, 1)


def test_images_that_are_no_files_are_not_cropped() -> None:
    data = build("data", {"name": "emoji"}, image_size=32, seed=0)
    with pytest.raises(UserError, match=r"has no image files to crop; use protocol\.crop=source"):
        crop_split(data.split("validation"), (32, 32), "center", "bicubic")

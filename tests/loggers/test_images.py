"""Grids of images: the position of every image, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqf.loggers.image_grid import GAP, make_grid, split_grid
from vqf.registry import build


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.sampled_from([(5, 7), (130, 4)]))
def test_every_image_stands_in_its_cell(count: int, columns: int, size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
    sheet = np.array(make_grid(pixels / 127.5 - 1, columns))
    scale = 2 if max(size) < 128 else 1
    height, width = (each * scale + GAP for each in size)
    columns = min(columns, count)
    assert sheet.shape == (-(-count // columns) * height + GAP, columns * width + GAP, 3)
    drawn = np.zeros(sheet.shape[:2], dtype=bool)
    for i in range(count):
        top, left = i // columns * height + GAP, i % columns * width + GAP
        cell = sheet[top : top + height - GAP, left : left + width - GAP]
        for row in range(scale):  # nearest neighbour: every copy is the pixel itself
            assert np.array_equal(cell[row::scale, row::scale], pixels[i].permute(1, 2, 0).numpy())
        drawn[top : top + height - GAP, left : left + width - GAP] = True
    assert (sheet[~drawn] == 255).all()


def test_values_outside_the_range_are_clamped() -> None:
    sheet = np.array(make_grid(torch.stack([torch.full((3, 2, 2), 7.0), torch.full((3, 2, 2), -7.0)])))
    assert sheet[GAP, GAP].tolist() == [255, 255, 255]
    assert sheet[GAP, 2 * GAP + 4].tolist() == [0, 0, 0]


def test_files_are_named_by_step_and_the_newest_is_there_twice(tmp_path: Path) -> None:
    logger = build("logger", {"name": "images", "limit": 3}, run_dir=tmp_path, config=None)
    first, second = (torch.rand(5, 3, 4, 4) * 2 - 1 for _ in range(2))
    logger.images(0, "samples", first)
    logger.images(1200, "samples", second)
    logger.images(1200, "a/b", second)
    logger.close()
    folder = tmp_path / "images"
    assert sorted(path.name for path in folder.iterdir()) == [
        "a-b-00001200.png",
        "a-b-latest.png",
        "samples-00000000.png",
        "samples-00001200.png",
        "samples-latest.png",
    ]
    with Image.open(folder / "samples-latest.png") as latest:
        assert np.array_equal(np.array(latest), np.array(make_grid(second[:3])))
    assert (folder / "samples-latest.png").read_bytes() == (folder / "samples-00001200.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "count", "size"), [("samples", 11, (5, 7)), ("completions", 9, (4, 4)), ("a", 1, (130, 9))]
)
def test_a_grid_is_taken_apart_again(tmp_path: Path, name: str, count: int, size: tuple[int, int]) -> None:
    images = torch.rand(count, 3, *size) * 2 - 1
    build("logger", {"name": "images"}, run_dir=tmp_path, config=None, subrun="").images(3, name, images)
    found = [np.array(each) for each in split_grid(tmp_path / "images" / f"{name}-latest.png")]
    expected = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(found), expected)


def test_what_belongs_together_is_neither_parted_by_the_end_of_a_row_nor_by_the_limit(tmp_path: Path) -> None:
    logger = build("logger", {"name": "images", "limit": 8}, run_dir=tmp_path, config=None, subrun="")
    for name in ("completions", "conditions-map", "samples"):
        logger.images(0, name, torch.rand(12, 3, 4, 4))
    folder = tmp_path / "images"
    counts = {path.stem: len(split_grid(path)) for path in folder.glob("*-latest.png")}
    assert counts == {"completions-latest": 6, "conditions-map-latest": 8, "samples-latest": 8}
    with Image.open(folder / "completions-latest.png") as sheet:
        assert sheet.width == 6 * (8 + GAP) + GAP


def test_an_image_from_elsewhere_is_one_image(tmp_path: Path) -> None:
    Image.new("L", (30, 20), 7).save(tmp_path / "chart.png")
    (image,) = split_grid(tmp_path / "chart.png")
    assert (image.size, image.getpixel((3, 3))) == ((30, 20), (7, 7, 7))

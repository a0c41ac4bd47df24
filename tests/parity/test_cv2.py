"""`data.resize=cv2` beside OpenCV itself, whose bilinear the reference scales images with: equal bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.parity.peers import need
from vqf.data.images.augment import CENTER_CROP, ViewParams
from vqf.data.images.resize import crop_and_resize


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def by_cv2(pixels: np.ndarray, size: tuple[int, int]) -> Any:
    cv2 = need("cv2")
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)


def smallest_max_size(pixels: np.ndarray, side: int) -> Any:
    """What the reference does, by albumentations 0.4.3: the shorter side becomes `side`, then the centre is cut out."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    whole = by_cv2(pixels, (round(height * scale), round(width * scale))) if scale != 1 else pixels
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    return whole[top : top + side, left : left + side]


def found(pixels: np.ndarray, size: tuple[int, int], view: ViewParams = CENTER_CROP) -> np.ndarray:
    return crop_and_resize(Image.fromarray(pixels), size, view, "cv2").permute(1, 2, 0).numpy()


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[st.integers(1, 90)] * 4))
def test_resize(sides: tuple[int, int, int, int]) -> None:
    """Any size to any other."""
    pixels, size = image(*sides[:2]), sides[2:]
    whole = ViewParams(regions=((1.0, sides[1] * size[0] / (sides[0] * size[1])),))
    assert np.array_equal(found(pixels, size, whole), by_cv2(pixels, size))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 64))
def test_smallest_max_size_and_centre_crop(height: int, width: int, side: int) -> None:
    """As the reference prepares every image."""
    pixels = image(height, width)
    assert np.array_equal(found(pixels, (side, side)), smallest_max_size(pixels, side))


@pytest.mark.parametrize("shape", [(512, 512), (375, 500), (1024, 1024), (640, 427)])
def test_usual_sizes(shape: tuple[int, int]) -> None:
    """To 256 pixels."""
    assert np.array_equal(found(image(*shape), (256, 256)), smallest_max_size(image(*shape), 256))


def test_it_is_not_what_is_done_by_default() -> None:
    pixels = image(60, 90)
    antialiased = crop_and_resize(Image.fromarray(pixels), (20, 20)).permute(1, 2, 0).int()
    assert (antialiased - torch.from_numpy(smallest_max_size(pixels, 20)).int()).abs().float().mean() > 10

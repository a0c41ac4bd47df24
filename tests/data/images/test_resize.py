import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqf.data.images import resize as resize_module
from vqf.data.images.augment import CENTER_CROP, Augmentation, ViewParams
from vqf.data.images.resize import Box, compute_crop_box, crop_and_resize, crop_offset, resize_box

shares = st.floats(0, 1, exclude_max=True)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth(height, width, coarse=8):
    return noise(height // coarse, width // coarse).resize((width, height), Image.Resampling.BICUBIC)


def shape(image):
    return image.height, image.width


def by_pillow(image, size, view=CENTER_CROP):
    return np.asarray(resize_box(image, size, compute_crop_box(shape(image), size, view)), dtype=int)


def levels(pixels):
    return pixels.permute(1, 2, 0).numpy().astype(int)


@given(st.integers(0, 50), shares)
def test_crop_offsets_are_in_range_and_the_center_rounds_down(room, place):
    assert 0 <= crop_offset(room, place) <= room
    assert crop_offset(room + 1e-9, place) == crop_offset(room - 1e-9, place) == crop_offset(room, place)
    assert crop_offset(room, None) == room // 2
    assert {crop_offset(room, (i + 0.5) / (room + 1)) for i in range(room + 1)} == set(range(room + 1))


@settings(max_examples=100, deadline=None)
@given(
    have=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    want=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    view=st.builds(ViewParams, crop_x=shares, crop_y=shares),
    resize=st.sampled_from(["antialias", "cv2"]),
)
def test_any_shape_becomes_the_size_wanted_and_no_foreign_color(have, want, view, resize):
    plain = Image.new("RGB", have[::-1], (10, 200, 77))
    for each in (view, ViewParams(view.crop_x, view.crop_y, regions=((0.5, 1.3), (0.2, 0.8)))):
        result = levels(crop_and_resize(plain, want, each, resize))
        assert result.shape == (*want, 3)
        assert (result == [10, 200, 77]).all()
        box = compute_crop_box(have, want, each, resize)
        assert 0 <= box.left < box.right <= have[1] and 0 <= box.top < box.bottom <= have[0]


@settings(max_examples=50, deadline=None)
@given(across=shares, wide=st.booleans(), resize=st.sampled_from(["antialias", "cv2"]))
def test_without_scaling_a_crop_copies_pixels(across, wide, resize):
    image = noise(32, 56) if wide else noise(56, 32)
    view = ViewParams(across if wide else 0.9, 0.1 if wide else across)
    whole, first = np.asarray(image), int(across * 25)
    expected = whole[:, first : first + 32] if wide else whole[first : first + 32]
    assert (levels(crop_and_resize(image, (32, 32), view, resize)) == expected).all()
    assert (by_pillow(image, (32, 32), view) == expected).all()


def test_covering_is_resize_then_crop():
    image = smooth(128, 192)
    resized = image.resize((96, 64), Image.Resampling.BICUBIC)
    for across, first in ((0.0, 0), (None, 16), (0.999, 32)):
        expected = np.asarray(resized.crop((first, 0, first + 64, 64)), dtype=int)
        assert np.abs(by_pillow(image, (64, 64), ViewParams(across)) - expected).max() <= 1


def test_a_very_long_image_takes_no_more_than_its_part(monkeypatch):
    monkeypatch.setattr(resize_module, "_resize_then_crop", None)
    assert crop_and_resize(Image.new("RGB", (1, 60_000)), (256, 256)).shape == (3, 256, 256)
    assert crop_and_resize(Image.new("RGB", (1, 60_000)), (256, 256), CENTER_CROP, "cv2").shape == (3, 256, 256)


def stripes():
    black_and_white = np.zeros((64, 64, 3), np.uint8)
    black_and_white[:, ::2] = 255
    return Image.fromarray(black_and_white)


def test_downscaling_is_antialiased_unless_as_cv2_does_it():
    for view in (CENTER_CROP, ViewParams(regions=((1.0, 1.0),))):
        assert np.abs(levels(crop_and_resize(stripes(), (16, 16), view))[:, 2:-2] - 127).max() <= 4
    sampled = levels(crop_and_resize(stripes(), (22, 22), CENTER_CROP, "cv2"))
    assert sampled.std() > 60


fractions = st.sampled_from([(1, 2), (2, 3), (3, 4), (1, 1), (5, 4), (3, 2)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 12), st.booleans(), fractions, shares)
def test_resize_then_crop_matches_pillow_along_rows_first(short, more, upright, fraction, place):
    numerator, denominator = fraction
    sides = (short * denominator, (short + more) * denominator)
    height, width = sides[::-1] if upright else sides
    image = noise(height, width, short)
    side = short * numerator
    across = image.resize((width * numerator // denominator, height), Image.Resampling.BICUBIC)
    whole = across.resize((across.width, height * numerator // denominator), Image.Resampling.BICUBIC)
    first = min(int(place * (more * numerator + 1)), more * numerator)
    left, top = (0, first) if upright else (first, 0)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), dtype=int)
    quick = levels(
        resize_module._resize_then_crop(resize_module._pixels(image), (side, side), ViewParams(place, place))
    )
    # Each pass rounds its weights in a way of its own; a level lost in the first is 1.25 at most after the second.
    assert np.abs(quick - expected).max() <= 2


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(4, 90), st.integers(4, 90)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.builds(ViewParams, crop_x=shares, crop_y=shares),
)
def test_every_resize_crops_the_same_box(have, size, view):
    rows, columns = np.mgrid[: have[0], : have[1]]
    slopes = np.stack([rows * 250 / have[0], columns * 250 / have[1], (rows + columns) * 120 / sum(have)], axis=2)
    image = Image.fromarray(slopes.round().astype(np.uint8))
    quick = levels(resize_module._resize_then_crop(resize_module._pixels(image), size, view))
    assert quick.shape == (*size, 3)
    assert np.abs(quick - by_pillow(image, size, view)).max() <= 2


regions = st.lists(st.tuples(st.floats(0.02, 1), st.floats(0.4, 2.5)), min_size=1, max_size=4).map(tuple)


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.builds(ViewParams, shares, shares, regions))
def test_a_region_has_the_area_and_the_ratio_that_were_drawn(have, view):
    size = (20, 30)
    box = compute_crop_box(have, size, view)
    assert box == tuple(map(int, box))
    assert 0 <= box.left < box.right <= have[1] and 0 <= box.top < box.bottom <= have[0]
    width, height = box.right - box.left, box.bottom - box.top
    sides = [
        ((have[0] * have[1] * a * r * 1.5) ** 0.5, (have[0] * have[1] * a / (r * 1.5)) ** 0.5) for a, r in view.regions
    ]
    fitting = [(round(w), round(h)) for w, h in sides if 0 < round(w) <= have[1] and 0 < round(h) <= have[0]]
    if fitting:
        assert (width, height) == fitting[0]
    else:
        assert width in (have[1], max(round(have[0] * 1.5), 1)) and height in (have[0], max(round(have[1] / 1.5), 1))


def test_a_region_is_stretched_to_the_size():
    image = smooth(80, 120)
    view = ViewParams(0.5, 0.25, regions=((0.2, 1.4),))
    box = compute_crop_box((80, 120), (24, 32), view)
    expected = np.asarray(image.crop(tuple(map(int, box))).resize((32, 24), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(levels(crop_and_resize(image, (24, 32), view)) - expected).max() <= 2


def test_regions_are_spread_as_torchvision_spreads_them():
    from torchvision.transforms import RandomResizedCrop

    views, generator = Augmentation("resized"), torch.Generator().manual_seed(0)
    ours = [compute_crop_box((60, 100), (32, 32), views.sample(generator)) for _ in range(1500)]
    torch.manual_seed(0)
    image = torch.zeros(3, 60, 100)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
    measured = [(b.top, b.left, b.bottom - b.top, b.right - b.left) for b in ours]
    for our, their in zip(np.array(measured).T, np.array(theirs).T, strict=True):
        grid = np.arange(101)
        gap = np.abs((our[:, None] <= grid).mean(0) - (their[:, None] <= grid).mean(0)).max()
        assert gap < 1.95 * (2 / 1500) ** 0.5  # Kolmogorov and Smirnov: one in a thousand


def bilinear(image, size):
    """The formula in float64, (H, W, 3)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 60)] * 4))
def test_as_cv2_is_bilinear_between_the_centres_of_pixels(sides):
    image, size = noise(*sides[:2]), sides[2:]
    found = levels(
        crop_and_resize(image, size, ViewParams(regions=((1.0, sides[1] * size[0] / (sides[0] * size[1])),)), "cv2")
    )
    assert np.abs(found - bilinear(image, size)).max() < 1


@pytest.mark.parametrize(("have", "tall", "wide"), [((50, 75), 32, 48), ((75, 50), 48, 32), ((37, 53), 32, 46)])
def test_as_cv2_scales_to_whole_numbers_then_crops(have, tall, wide):
    image = noise(*have)
    top, left = (tall - 32) // 2, (wide - 32) // 2
    expected = bilinear(image, (tall, wide))[top : top + 32, left : left + 32]
    assert np.abs(levels(crop_and_resize(image, (32, 32), CENTER_CROP, "cv2")) - expected).max() < 1
    box = compute_crop_box(have, (32, 32), CENTER_CROP, "cv2")
    assert box.left == pytest.approx(left * have[1] / wide)
    assert box.right - box.left == pytest.approx(32 * have[1] / wide)


def test_crop_boxes_are_normalized():
    assert Box(10, 20, 30, 60).normalized((80, 40)).tolist() == [0.25, 0.25, 0.75, 0.75]


SCRIPT = """
import hashlib, torch
from tests.data.images.test_resize import noise
from vqf.data.images.augment import CENTER_CROP, ViewParams
from vqf.data.images.resize import crop_and_resize
digest = hashlib.sha256()
for seed, (height, width) in enumerate([(64, 64), (90, 61), (33, 100), (200, 210), (20, 200)]):
    for size in ((32, 32), (48, 30), (80, 80)):
        for view in (CENTER_CROP, ViewParams(0.3, 0.8), ViewParams(0.5, 0.2, regions=((0.4, 1.2),))):
            for resize in ("antialias", "cv2"):
                pixels = crop_and_resize(noise(height, width, seed), size, view, resize)
                digest.update(pixels.contiguous().numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


@pytest.mark.slow
def test_processors_with_and_without_vectors_make_the_same_images():
    """torch chooses its loops by what the processor can do; ATEN_CPU_CAPABILITY says what it may."""
    results = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        name, digest = done.stdout.split()
        results[name] = digest
    assert "DEFAULT" in results
    assert len(set(results.values())) == 1

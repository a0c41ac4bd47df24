import io
import warnings

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps

from vqf.data import imaging
from vqf.data.imaging import UnreadableError, contain, cover, open_picture, read, to_rgb, to_tensor

COLORS = np.array([[[200, 30, 60], [0, 0, 0], [255, 255, 255]], [[10, 120, 240], [90, 90, 90], [255, 0, 0]]], np.uint8)
BLOCKS = COLORS.repeat(8, 0).repeat(8, 1)  # 16 x 24, six plain squares
GREY = np.asarray(Image.fromarray(BLOCKS).convert("L"))
SIZE = BLOCKS.shape[:2]


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def pixels(tensor):
    """Undo the scaling to [-1, 1]. -> (H, W, 3)"""
    return ((tensor.double() + 1) * 127.5).permute(1, 2, 0).numpy()


def noise(height, width, smooth=8):
    coarse = np.random.default_rng(0).integers(0, 256, (height // smooth, width // smooth, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def in_three_channels(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


RGB = Image.fromarray(BLOCKS)
PALETTE = RGB.quantize(16)
ALPHA = np.tile(np.arange(24, dtype=np.uint8) * 10, (16, 1))
ON_WHITE = BLOCKS.astype(float) * ALPHA[..., None] / 255 + 255 * (1 - ALPHA[..., None] / 255.0)
GREY_ON_WHITE = in_three_channels(GREY * (ALPHA / 255.0) + 255 * (1 - ALPHA / 255.0))
RGBA = Image.fromarray(np.dstack([BLOCKS, ALPHA]))


@pytest.mark.parametrize(
    ("image", "kind", "mode", "expected"),
    [
        (Image.fromarray(GREY > 100), "PNG", "1", in_three_channels((GREY > 100) * 255)),
        (Image.fromarray(GREY), "PNG", "L", in_three_channels(GREY)),
        (Image.fromarray(np.dstack([GREY, ALPHA])), "PNG", "LA", GREY_ON_WHITE),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", "I;16", in_three_channels(GREY)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF", "I;16", in_three_channels(GREY)),
        (Image.fromarray(GREY.astype(np.int32) * 257), "TIFF", "I", in_three_channels(GREY)),
        (PALETTE, "PNG", "P", np.asarray(PALETTE.convert("RGB"))),
        (PALETTE, "GIF", "P", np.asarray(PALETTE.convert("RGB"))),
        (RGB, "PNG", "RGB", BLOCKS),
        (RGB, "BMP", "RGB", BLOCKS),
        (RGB, "PPM", "RGB", BLOCKS),
        (RGBA, "PNG", "RGBA", ON_WHITE),
        (RGBA, "TIFF", "RGBA", ON_WHITE),
        (Image.fromarray(255 - np.dstack([BLOCKS, np.full_like(GREY, 255)]), "CMYK"), "TIFF", "CMYK", BLOCKS),
    ],
)
def test_every_mode_becomes_rgb_on_white(image, kind, mode, expected):
    file = saved(image, kind)
    with Image.open(file) as opened:
        assert opened.mode == mode
    file.seek(0)
    result = read(file, SIZE)
    assert result.dtype == torch.float32
    assert result.shape == (3, *SIZE)
    np.testing.assert_allclose(pixels(result), expected, atol=1.001 if image.mode in ("LA", "RGBA") else 1e-4)


@pytest.mark.parametrize(
    ("image", "options", "kind", "tolerance"),
    [
        (RGB, {"quality": 100, "subsampling": 0}, "JPEG", 4),
        (RGB.convert("CMYK"), {"quality": 100, "subsampling": 0}, "JPEG", 4),
        (RGB, {"lossless": True}, "WEBP", 1e-4),
    ],
)
def test_compressed_formats_keep_the_colours(image, options, kind, tolerance):
    np.testing.assert_allclose(pixels(read(saved(image, kind, **options), SIZE)), BLOCKS, atol=tolerance)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_put_on_white(mode):
    plain = RGB.quantize(16) if mode == "P" else RGB.convert(mode)
    marked = {"P": plain.getpixel((0, 0)), "L": int(GREY[0, 0]), "RGB": tuple(BLOCKS[0, 0].tolist())}[mode]
    expected = np.array(plain.convert("RGB"))
    expected[:8, :8] = 255
    np.testing.assert_allclose(pixels(read(saved(plain, "PNG", transparency=marked), SIZE)), expected, atol=1e-4)


def test_a_16_bit_portable_greymap():
    content = b"P5 24 16 65535\n" + (GREY.astype(">u2") * 257).tobytes()
    np.testing.assert_allclose(pixels(read(io.BytesIO(content), SIZE)), in_three_channels(GREY), atol=1e-4)


def test_lab_becomes_the_colours_it_was_made_from():
    mild = Image.fromarray(BLOCKS // 4 + 96)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(mild, *profiles, outputMode="LAB")
    np.testing.assert_allclose(pixels(read(saved(lab, "TIFF"), SIZE)), np.asarray(mild), atol=3)


def test_of_an_animation_the_first_frame():
    frames = [RGB, Image.new("RGB", RGB.size, "red")]
    file = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels(read(file, SIZE)), BLOCKS, atol=1e-4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"), dtype=float)
    file.seek(0)
    np.testing.assert_allclose(pixels(read(file, expected.shape[:2])), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_matter():
    file = saved(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_allclose(pixels(read(file, SIZE)), BLOCKS, atol=1e-4)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(32, 32), (64, 24)])
def test_a_large_jpeg_is_decoded_small_with_less_difference_than_another_filter_makes(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(Image.fromarray(skimage.data.coffee()), "JPEG", quality=95, exif=exif)
    small = open_picture(file, size)
    file.seek(0)
    full = open_picture(file)
    assert small.width * 2 <= full.width
    assert small.width >= 2 * size[1]
    assert small.height >= 2 * size[0]
    covered = np.asarray(cover(full, size), dtype=float)
    scale = max(size[0] / full.height, size[1] / full.width)
    left, top = (int(full.width * scale) - size[1]) // 2 / scale, (int(full.height * scale) - size[0]) // 2 / scale
    box = (left, top, left + size[1] / scale, top + size[0] / scale)
    lanczos = np.asarray(full.resize(size[::-1], Image.Resampling.LANCZOS, box=box), dtype=float)
    difference = np.asarray(cover(small, size), dtype=float) - covered
    assert np.square(difference).mean() < np.square(lanczos - covered).mean()


def test_how_small_a_jpeg_is_decoded_reckons_with_its_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # 600 x 150 in the file, 150 x 600 upright
    file = saved(Image.fromarray(skimage.data.coffee()[:150]), "JPEG", exif=exif)
    assert open_picture(file, (12, 24)).size == (75, 300)


CUT = saved(noise(64, 64), "JPEG").getvalue()
CUT_PNG = saved(noise(64, 64), "PNG").getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)"),
        (b"<svg></svg>", "not a picture of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "not a picture of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)",
        ),
        (CUT[: len(CUT) // 2], "image file is truncated"),
        (CUT_PNG[: len(CUT_PNG) // 2], "image file is truncated"),
        (saved(Image.new("1", (5000, 5000)), "PNG").getvalue(), "5000 x 5000 pixels, more than max_pixels=16777216"),
        (saved(Image.fromarray(GREY / np.float32(255)), "TIFF").getvalue(), "floating-point pixels"),
    ],
)
def test_broken_and_unwanted_content_is_unreadable(content, reason):
    with pytest.raises(UnreadableError) as caught:
        read(io.BytesIO(content), (32, 32), max_pixels=2**24)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_paths_that_cannot_be_opened(tmp_path):
    with pytest.raises(UnreadableError, match=r"^no such file or directory$"):
        read(tmp_path / "none.png", (8, 8))
    with pytest.raises(UnreadableError, match=r"^is a directory$"):
        read(tmp_path, (8, 8))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    file = saved(Image.new("1", (5000, 5000)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableError, match="5000 x 5000"):
        read(file, (8, 8), max_pixels=24_999_999)


VALID = {
    kind: saved(noise(32, 40), kind).getvalue() for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
} | {"CMYK": saved(noise(32, 40).convert("CMYK"), "JPEG").getvalue()}


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.floats(0.1, 1),
)
def test_any_damage_ends_in_a_picture_or_in_unreadable(kind, flips, keep):
    content = bytearray(VALID[kind])
    for place, value in flips:
        content[place % len(content)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = read(io.BytesIO(bytes(content[: int(keep * len(content))])), (16, 16), max_pixels=2**20)
        except UnreadableError:
            return
    assert result.shape == (3, 16, 16)
    assert -1 <= result.min() <= result.max() <= 1


@settings(max_examples=100, deadline=None)
@given(
    have=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    want=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    across=st.floats(0, 1, exclude_max=True),
    down=st.floats(0, 1, exclude_max=True),
)
def test_cover_gives_the_size_wanted_and_no_foreign_colour(have, want, across, down):
    plain = Image.new("RGB", have[::-1], (10, 200, 77))
    result = np.asarray(cover(plain, want, across, down))
    assert result.shape == (*want, 3)
    assert (result == [10, 200, 77]).all()


@settings(max_examples=50, deadline=None)
@given(across=st.floats(0, 1, exclude_max=True), wide=st.booleans())
def test_without_scaling_a_crop_copies_pixels(across, wide):
    picture = noise(32, 56, 4) if wide else noise(56, 32, 4)
    result = np.asarray(cover(picture, (32, 32), across if wide else 0.9, 0.1 if wide else across))
    whole, first = np.asarray(picture), int(across * 25)
    expected = whole[:, first : first + 32] if wide else whole[first : first + 32]
    assert (result == expected).all()


def test_cover_is_resize_then_crop():
    picture = noise(128, 192)
    resized = picture.resize((96, 64), Image.Resampling.BICUBIC)
    for across, first in ((0.0, 0), (0.5, 16), (0.999, 32)):
        expected = np.asarray(resized.crop((first, 0, first + 64, 64)), dtype=int)
        assert np.abs(np.asarray(cover(picture, (64, 64), across), dtype=int) - expected).max() <= 1


def test_a_very_long_picture_takes_no_more_than_its_part():
    assert cover(Image.new("RGB", (1, 60_000)), (256, 256)).size == (256, 256)


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = np.asarray(cover(Image.fromarray(stripes), (16, 16)))[:, 2:-2]
    assert np.abs(result.astype(int) - 127).max() <= 4


def test_black_is_minus_one_and_white_is_one():
    assert (to_tensor(Image.new("RGB", (2, 2), "black")) == -1).all()
    assert (to_tensor(Image.new("RGB", (2, 2), "white")) == 1).all()


def test_to_rgb_leaves_rgb_alone():
    assert np.array_equal(np.asarray(to_rgb(RGB)), BLOCKS)


def test_contain_centres_and_leaves_the_rest_empty():
    result = contain(torch.ones(4, 8, 8), (8, 16))
    assert result.shape == (4, 8, 16)
    assert (result[:, :, 4:12] == 1).all()
    assert result.sum() == 4 * 64


fractions = st.sampled_from([(1, 2), (2, 3), (3, 4), (1, 1), (5, 4), (3, 2)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 12), st.booleans(), fractions, st.floats(0, 1))
def test_the_quick_way_is_pillow_scaling_the_whole_picture_first_across_then_down(
    short, more, upright, fraction, place
):
    numerator, denominator = fraction
    sides = (short * denominator, (short + more) * denominator)
    height, width = sides[::-1] if upright else sides
    image = Image.fromarray(np.random.default_rng(short).integers(0, 256, (height, width, 3), np.uint8))
    side = short * numerator
    across = image.resize((width * numerator // denominator, height), Image.Resampling.BICUBIC)
    whole = across.resize((across.width, height * numerator // denominator), Image.Resampling.BICUBIC)
    first = min(int(place * (more * numerator + 1)), more * numerator)
    left, top = (0, first) if upright else (first, 0)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), dtype=int)
    quick = imaging._cover_whole(image, (side, side), place, place).permute(1, 2, 0).numpy()
    # Each pass rounds its weights in a way of its own; a level lost in the first is 1.25 at most after the second.
    assert np.abs(quick - expected).max() <= 2


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(4, 90), st.integers(4, 90)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_quick_way_cuts_where_the_other_does(shape, size, across, down):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    slopes = np.stack([rows * 250 / shape[0], columns * 250 / shape[1], (rows + columns) * 120 / sum(shape)], axis=2)
    image = Image.fromarray(slopes.round().astype(np.uint8))
    quick = imaging._cover_whole(image, size, across, down)
    assert quick.shape == (3, *size)
    difference = quick.permute(1, 2, 0).numpy().astype(int) - np.asarray(cover(image, size, across, down))
    assert np.abs(difference).max() <= 2


def test_both_ways_of_reading_agree(monkeypatch):
    file = saved(noise(120, 96), "PNG")
    monkeypatch.setattr(imaging, "VECTORISED", (torch.backends.cpu.get_cpu_capability(),))
    quick = read(file, (40, 40), across=0.2, down=0.7)
    monkeypatch.setattr(imaging, "VECTORISED", ())
    exact = read(file, (40, 40), across=0.2, down=0.7)
    assert (quick - exact).abs().max() <= 2 / 127.5 + 1e-6
    assert torch.equal(exact, to_tensor(cover(noise(120, 96), (40, 40), 0.2, 0.7)))


def test_a_long_picture_is_not_scaled_whole(monkeypatch):
    monkeypatch.setattr(imaging, "VECTORISED", (torch.backends.cpu.get_cpu_capability(),))
    monkeypatch.setattr(imaging, "_cover_whole", None)
    assert read(saved(Image.new("RGB", (4000, 3)), "PNG"), (64, 64)).shape == (3, 64, 64)

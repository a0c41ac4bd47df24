import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageOps

from vqf.data.images import decode
from vqf.data.images.alpha import contain
from vqf.data.images.augment import ViewParams
from vqf.data.images.decode import UnreadableError, open_image, to_rgb, to_tensor
from vqf.data.images.resize import compute_crop_box, crop_and_resize, resize_box

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


def read(source, size, *given, **options):
    """The pixels of a crop."""
    return decode.read_crop(source, size, *given, **options).image


def noise(height, width, smooth=8):
    coarse = np.random.default_rng(0).integers(0, 256, (height // smooth, width // smooth, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def chunk(name, content):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


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
        (RGB, {"quality": 100, "subsampling": 0, "progressive": True}, "JPEG", 4),
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


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_each_color(channels):
    """48 and 64 bits a pixel, which Pillow cannot write; put together as the PNG specification says."""
    levels = np.dstack([BLOCKS, np.full_like(GREY, 255)])[..., :channels].astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 24, 16, 16, 2 if channels == 3 else 6, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    np.testing.assert_allclose(pixels(read(io.BytesIO(content), SIZE)), BLOCKS, atol=1e-4)


def test_a_16_bit_portable_greymap():
    content = b"P5 24 16 65535\n" + (GREY.astype(">u2") * 257).tobytes()
    np.testing.assert_allclose(pixels(read(io.BytesIO(content), SIZE)), in_three_channels(GREY), atol=1e-4)


def test_lab_becomes_the_colours_it_was_made_from():
    mild = Image.fromarray(BLOCKS // 4 + 96)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(mild, *profiles, outputMode="LAB")
    np.testing.assert_allclose(pixels(read(saved(lab, "TIFF"), SIZE)), np.asarray(mild), atol=3)


def animated(kind):
    return saved(RGB, kind, save_all=True, append_images=[Image.new("RGB", RGB.size, "red")])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_refused_or_its_first_frame_is_taken(kind):
    with pytest.raises(UnreadableError, match=r"^animated; data.animated=first takes the first frame$"):
        open_image(animated(kind), animated="refuse")
    first = np.asarray(open_image(animated(kind)).convert("RGB"), dtype=float)
    np.testing.assert_allclose(pixels(read(animated(kind), SIZE)), first, atol=1e-4)
    assert np.abs(first - BLOCKS).mean() < 8 < np.abs(first - [255, 0, 0]).mean()


@pytest.mark.parametrize("kind", ["MPO", "TIFF"])
def test_previews_and_pages_are_no_animation(kind):
    """Phones put a second image behind a JPEG, which Pillow then calls MPO."""
    taken = open_image(animated(kind), animated="refuse")
    assert taken.format == ("JPEG" if kind == "MPO" else "TIFF")
    assert np.abs(np.asarray(taken, dtype=float) - BLOCKS).mean() < 8


def test_a_color_profile_is_left_alone():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_allclose(pixels(read(saved(RGB, "PNG", icc_profile=profile), SIZE)), BLOCKS, atol=1e-4)


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


def text(side):
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for y in range(0, side, 12):
        pen.text((0, y), "The quick brown fox jumps over 0123456789 lazy dogs. " * (side // 250 + 1), fill="black")
    return image


def photograph(side):
    return Image.fromarray(skimage.data.astronaut()).resize((side, side), Image.Resampling.LANCZOS)


def off(kind, side, size, **options):
    """RMS difference in levels between reduced and full decoding of a JPEG."""
    file = saved(kind(side), "JPEG", quality=95, **options)
    full = to_rgb(open_image(file))
    file.seek(0)
    assert open_image(file, (size, size)).width < full.width
    file.seek(0)
    exact = crop_and_resize(full, (size, size)).permute(1, 2, 0).numpy().astype(float)
    return np.square(pixels(read(file, (size, size))) - exact).mean() ** 0.5


@pytest.mark.parametrize("side", [1536, 1537, 1543, 1731])  # a half, of a side that two divides, and that it does not
@pytest.mark.parametrize(("kind", "most"), [(photograph, 1), (text, 3), (lambda side: noise(side, side, 1), 2)])
def test_a_large_jpeg_decoded_small_is_as_if_it_were_decoded_whole(kind, most, side):
    assert off(kind, side, 256) <= most


@pytest.mark.parametrize(("side", "size"), [(776, 64), (781, 64), (1543, 64), (1551, 64)])  # a quarter, and an eighth
@pytest.mark.parametrize(("kind", "most"), [(photograph, 1), (text, 3), (lambda side: noise(side, side, 1), 2)])
def test_at_a_quarter_and_an_eighth(kind, most, side, size):
    assert off(kind, side, size) <= most


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_of_odd_sides_decoded_small_is_not_shifted_whichever_way_it_is_turned(orientation):
    """A slope shows a shift of half a pixel everywhere; noise would hide it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.linspace(0, 255, 393)
    slopes = np.dstack([np.tile(ramp[:385], (393, 1)), np.tile(ramp[:, None], (1, 385)), np.full((393, 385), 99)])
    file = saved(Image.fromarray(slopes.round().astype(np.uint8)), "JPEG", quality=100, subsampling=0, exif=exif)
    assert max(open_image(file, (16, 16)).size) == 50
    for view in (ViewParams(), ViewParams(0.2, 0.9), ViewParams(0.3, 0.6, regions=((0.9, 1.0),))):
        file.seek(0)
        shown = decode.read_crop(file, (16, 16), view)
        file.seek(0)
        full = to_rgb(open_image(file))
        shape = full.height, full.width
        exact = np.asarray(resize_box(full, (16, 16), compute_crop_box(shape, (16, 16), view)), dtype=float)
        assert np.abs(pixels(shown.image).round() - exact).max() <= 1
        assert (shown.shape, shown.box) == (shape, compute_crop_box(shape, (16, 16), view))


def test_how_small_a_jpeg_is_decoded_reckons_with_its_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # 600 x 150 in the file, 150 x 600 upright
    file = saved(Image.fromarray(skimage.data.coffee()[:150]), "JPEG", exif=exif)
    assert open_image(file, (12, 24)).size == (75, 300)  # 3 x 24 would fit into 38, but 3 x 12 not into 37


def test_a_part_of_a_large_jpeg_is_decoded_as_large_as_it_is_needed():
    file = saved(Image.fromarray(skimage.data.coffee()), "JPEG", quality=95)
    quarter = ViewParams(crop_x=0.3, crop_y=0.8, regions=((0.25, 1.0),))  # 245 pixels high and wide
    assert open_image(file, (32, 32), view=quarter).size == (300, 200)
    assert open_image(file, (32, 32)).size == (150, 100)
    shown = decode.read_crop(file, (32, 32), quarter)
    exact = resize_box(open_image(file), (32, 32), compute_crop_box((400, 600), (32, 32), quarter))
    assert np.square(pixels(shown.image) - np.asarray(exact, dtype=float)).mean() < 4


def test_a_crop_knows_its_box():
    shown = decode.read_crop(saved(noise(64, 96), "PNG"), (32, 32), ViewParams(crop_x=0.999))
    assert (shown.shape, shown.box) == ((64, 96), (32, 0, 96, 64))
    torch.testing.assert_close(shown.crop_box, torch.tensor([0, 1 / 3, 1, 1]))
    turned = ViewParams(flipped=True)
    assert torch.equal(turned.flip_box(shown.crop_box), shown.crop_box[[0, 3, 2, 1]])
    assert torch.equal(turned.apply(shown.image), shown.image.flip(-1))


def test_cv2_scales_every_pixel_of_a_large_jpeg():
    file = saved(Image.fromarray(skimage.data.coffee()), "JPEG")
    assert decode.read_crop(file, (32, 32), resize="cv2").shape == (400, 600)


KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_unreadable(kind, share):
    content = saved(noise(64, 64), kind).getvalue()
    with pytest.raises(UnreadableError):
        read(io.BytesIO(content[: int(len(content) * share)]), (32, 32))


CUT = saved(noise(64, 64), "JPEG").getvalue()
CUT_PNG = saved(noise(64, 64), "PNG").getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)"),
        (b"<svg></svg>", "not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)",
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


def blank_png(width, height):
    """The header of an image without its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))


@pytest.mark.parametrize(
    ("side", "reason"),
    [(5000, "5000 x 5000 pixels"), (12_000, "12000 x 12000 pixels"), (40_000, "more pixels than Pillow opens at all")],
)
def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch, side, reason):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UnreadableError, match=reason):
            read(blank_png(side, side), (8, 8), max_pixels=24_999_999)


VALID = {kind: saved(noise(32, 40), kind).getvalue() for kind in KINDS} | {
    "CMYK": saved(noise(32, 40).convert("CMYK"), "JPEG").getvalue()
}


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.floats(0.1, 1),
)
def test_any_damage_ends_in_an_image_or_in_unreadable(kind, flips, keep):
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

"""A long text or color profile in a PNG does not make its pixels unreadable."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.data.images.test_decode import chunk
from vqf.data.images.decode import UnreadableError, image_format, open_image
from vqf.data.images.png_text import without_text

LONG = 3_000_000
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


def note(**options):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * LONG, **options)
    return info


def international():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * LONG, zip=True)
    return info


def png(**options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", **options)
    return file.getvalue()


def before_the_pixels(extra):
    content = png()
    return content[:33] + extra + content[33:]  # after the signature and the header


CONTENTS = {
    "zTXt": png(pnginfo=note(zip=True)),
    "tEXt": png(pnginfo=note()),
    "iTXt": png(pnginfo=international()),
    "iCCP": before_the_pixels(chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(LONG)))),
    "many tEXt": before_the_pixels(chunk(b"tEXt", b"key\0" + b"x" * 9_000_000) * 9),
    "at the end": png()[:-12] + chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * LONG)) + png()[-12:],
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_pixels_are_read_whatever_the_text(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for source in (path, io.BytesIO(content)):
        assert np.array_equal(np.asarray(open_image(source)), PIXELS)
    assert image_format(content) == "PNG"


def test_the_orientation_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(io.BytesIO(png(pnginfo=note(zip=True), exif=exif)))
    assert np.array_equal(np.asarray(image), np.rot90(PIXELS, -1))


def test_only_text_and_profile_are_removed_and_only_of_png():
    assert without_text(io.BytesIO(CONTENTS["iCCP"])).read() == png()
    assert without_text(io.BytesIO(png())) is None
    assert without_text(io.BytesIO(b"GIF89a")) is None


def test_a_broken_png_with_text_stays_broken():
    for content in (CONTENTS["zTXt"][:-30], CONTENTS["zTXt"][:20], CONTENTS["zTXt"][:60]):
        with pytest.raises(UnreadableError):
            open_image(io.BytesIO(content))

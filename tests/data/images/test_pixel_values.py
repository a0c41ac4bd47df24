"""Gray images of more than 8 bits: 12 bits, 32-bit integers and floats, with and without `data.range`."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.composing import compose
from vqf.data.folder import Folder
from vqf.data.images.decode import UnreadableError, read_crop, to_rgb
from vqf.data.images.pixel_values import check_range
from vqf.data.pairs import Pairs
from vqf.data.shards import Shards
from vqf.errors import UserError
from vqf.images import read_image
from vqf.pipelines.check import Check
from vqf.pipelines.shard import Shard

RAMPS = {  # format, first and last value, type
    "12 bits in a 16-bit PNG": ("PNG", 0, 4095, "uint16"),
    "0 to 255 in a 32-bit TIFF": ("TIFF", 0, 255, "int32"),
    "Hounsfield units in a 32-bit TIFF": ("TIFF", -1000, 3000, "int32"),
    "meters in a float TIFF": ("TIFF", -0.5, 7.25, "float32"),
}


def ramp(low, high, kind):
    return np.tile(np.linspace(low, high, 64), (64, 1)).astype(kind)


def saved(values, format):
    file = io.BytesIO()
    Image.fromarray(values).save(file, format)
    return io.BytesIO(file.getvalue())


def write(path, values, format="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved(values, format).getvalue())


@pytest.mark.parametrize(("format", "low", "high", "kind"), RAMPS.values(), ids=RAMPS)
def test_a_range_spreads_the_values_over_black_to_white(format, low, high, kind):
    values = ramp(low, high, kind)
    crop = read_crop(saved(values, format), (64, 64), pixel_range=(low, high))
    expected = (values.astype(float) - low) / (high - low) * 2 - 1
    assert np.abs(crop.image[0].numpy() - expected).max() <= 1 / 255 + 1e-6  # half of one of 255 levels
    assert crop.values == (low, high)


def test_without_a_range_16_bits_are_read_as_before_and_values_beyond_are_no_black_or_white():
    full = read_crop(saved(ramp(0, 65535, "uint16"), "PNG"), (64, 64)).image
    assert (full.min(), full.max()) == (-1, 1)
    for low, high in ((-1000, 3000), (0, 70000)):
        with pytest.raises(UnreadableError) as caught:
            read_crop(saved(ramp(low, high, "int32"), "TIFF"), (64, 64))
        assert str(caught.value) == (
            f"values outside of 0 to 65535; give the values of black and white, as in data.range=[{low},{high}]"
        )
    with pytest.raises(UnreadableError, match=r"^floating-point pixels, .* data\.range=\[-0\.5,7\.25\]$"):
        read_crop(saved(ramp(-0.5, 7.25, "float32"), "TIFF"), (64, 64))
    with pytest.raises(UnreadableError, match=r"^pixels that are no numbers \(nan\)$"):
        read_crop(saved(np.full((8, 8), np.nan, "float32"), "TIFF"), (8, 8), pixel_range=(0, 1))


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_values_beyond_the_range_are_clipped_and_others_rounded(value, low, high):
    low, high = sorted((low, high))
    if low == high:
        return
    pixel = np.asarray(to_rgb(Image.fromarray(np.full((1, 1), value, "int32")), (low, high)))[0, 0, 0]
    exact = 255 * (min(max(value, low), high) - low) / (high - low)
    assert abs(int(pixel) - exact) <= 0.5 + 1e-6


def test_a_range_may_be_wider_than_the_type_of_the_file():
    values = ramp(0, 4000, "uint16")
    grey = np.asarray(to_rgb(Image.fromarray(values), (-4000, 4000)))[..., 0]
    assert (grey.min(), grey.max()) == (128, 255)


def test_an_image_of_the_command_line_is_read_with_the_range_of_the_data(tmp_path):
    write(tmp_path / "a.tif", ramp(-1000, 3000, "int32"), "TIFF")
    image = read_image(tmp_path / "a.tif", (-1000, 3000))
    assert (image.min(), image.max()) == (-1, 1)
    with pytest.raises(UserError, match=r"readable image \(values outside .*, as in data\.range=\[-1000,3000\]\)$"):
        read_image(tmp_path / "a.tif")


def test_8_bits_are_left_as_they_are():
    image = Image.fromarray(ramp(0, 255, "uint8"))
    assert np.array_equal(np.asarray(to_rgb(image, (0, 10)))[..., 0], np.asarray(image))


@pytest.mark.parametrize("values", [(1,), (3, 3), (5, 0), (0, float("inf")), (0, 1, 2)])
def test_impossible_ranges(tmp_path, values):
    with pytest.raises(ValueError, match=r"^range=\[.*\] is not the values of black and white, the smaller one first$"):
        check_range("range", values)


def test_a_run_mentions_the_first_dark_image_once_and_the_option(tmp_path, caplog):
    for i in range(4):
        write(tmp_path / f"{i}.png", ramp(0, 4095, "uint16"))
    split = Folder(64, 0, root=str(tmp_path), validation_fraction=0).split("train")
    with caplog.at_level(logging.WARNING, "vqf"):
        for i in range(4):
            split.item(0, i)
    assert [record.getMessage() for record in caplog.records] == [
        "data.range: '0.png' has values of 0 to 4095 where 65535 is white, and becomes dark; give the values of black "
        "and white, as in data.range=[0,4095] (pipeline=check shows the values of all images)"
    ]
    caplog.clear()
    ranged = Folder(64, 0, root=str(tmp_path), validation_fraction=0, range=(0, 4095)).split("train")
    assert ranged.item(0, 0).image.max() == 1 and not caplog.records
    assert ranged.fingerprint != split.fingerprint


def test_check_prints_the_values_of_every_mode(tmp_path, capsys):
    write(tmp_path / "p" / "deep.png", ramp(7, 4095, "uint16"))
    write(tmp_path / "p" / "wide.tif", ramp(-1000, 3000, "int32"), "TIFF")
    write(tmp_path / "p" / "plain.png", ramp(3, 250, "uint8"))
    config = compose("data=folder", f"data.root={tmp_path / 'p'}", "image_size=16", "data.validation_fraction=0")
    Check(config, tmp_path / "run").run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())["splits"]["train"]
    assert report["values"] == {"I;16": [7, 4095], "L": [3, 250]}
    assert "data.range=[-1000,3000]" in report["unreadable"]["wide.tif"]
    assert "I;16 7 to 4095, L 3 to 250" in " ".join(capsys.readouterr().out.split())


def test_maps_have_a_range_of_their_own(tmp_path):
    for i in range(2):
        write(tmp_path / "images" / f"{i}.png", ramp(0, 255, "uint8"))
        write(tmp_path / "conditions" / f"{i}.tif", ramp(200, 12000, "int32"), "TIFF")
    options = {"root": str(tmp_path), "maps": "grey", "validation_fraction": 0, "crop": "center", "flip": False}
    plain = Pairs(64, 0, **options).split("train")
    ranged = Pairs(64, 0, **options, map_range=(200, 12000)).split("train")
    assert plain.item(0, 0).condition.max() < -0.6
    assert (ranged.item(0, 0).condition.min(), ranged.item(0, 0).condition.max()) == (-1, 1)
    assert plain.fingerprint != ranged.fingerprint
    write(tmp_path / "conditions" / "0.tif", ramp(-5, 5, "int32"), "TIFF")
    with pytest.raises(ValueError, match=r"its map '0\.tif': values outside .* data\.map_range=\[-5,5\]$"):
        plain.file(0).probe(plain.file(0).read_bytes())
    with pytest.raises(ValueError, match=r"^map_range is for gray maps"):
        Pairs(64, 0, root=str(tmp_path), maps="labels", labels=3, map_range=(0, 1))


def test_copied_files_need_the_range_again_and_rendered_ones_do_not(tmp_path, caplog):
    for i in range(3):
        write(tmp_path / "p" / f"{i}.png", ramp(0, 4095, "uint16"))
    caplog.set_level(logging.INFO, "vqf")
    options = {"crop": "center", "flip": False, "validation": None}
    expected = Folder(64, 0, root=str(tmp_path / "p"), range=(0, 4095), validation_last=0, crop="center", flip=False)
    for format, pixel_range in (("original", (0, 4095)), ("png", None)):
        out = tmp_path / format
        words = "data=folder", f"data.root={tmp_path / 'p'}", "data.range=[0,4095]", "data.validation_last=0"
        Shard(compose(*words, "image_size=64"), tmp_path, out=str(out), format=format).run()
        split = Shards(64, 0, root=str(out), range=pixel_range, **options).split("train")
        assert torch.equal(split.item(0, 0).image, expected.split("train").item(0, 0).image)
    line = "data.range: files are copied as they are; give data.range=[0,4095] to data=shards as well"
    assert [record.getMessage() for record in caplog.records].count(line) == 1

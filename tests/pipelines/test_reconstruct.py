"""Reconstructions of a user's own images: their size, names and numbers."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.errors import UserError
from vqf.models import tiled_encoding
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.reconstruction.own_size import output_names
from vqf.pipelines.stage1 import Stage1

SIZES = {"a/photo.jpg": (45, 33), "b/photo.png": (24, 40), "b/other.png": (17, 18), "c/twin.png": (16, 16)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    Stage1(compose("pipeline=stage1", *TINY), folder).run()
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, (width, height) in {**SIZES, "c/twin.jpg": (24, 24)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


def reconstruct(trained: Path, out: Path, **options: Any) -> dict[str, dict[str, float]]:
    config = compose("pipeline=reconstruct", "logger=[]", "metric=[psnr,ssim,usage]", "batch_size=4")
    config.run = str(trained)
    out.mkdir()
    Reconstruct(config, out, **options).run()
    return json.loads((out / "metrics.json").read_text())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_each_image_keeps_its_size_and_name(
    trained: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vqf")
    (title,) = reconstruct(trained, tmp_path / "out", images=str(images))
    written = {
        str(path.relative_to(tmp_path / "out" / "reconstructions")): Image.open(path).size
        for path in (tmp_path / "out").rglob("*.png")
    }
    assert written == {
        "a/photo.png": (40, 32),
        "b/photo.png": (24, 40),
        "b/other.png": (16, 16),
        "c/twin.png.png": (16, 16),
        "c/twin.jpg.png": (24, 24),
    }
    assert title == "reconstruction of 5 images at their own size"
    said = "5 images at their own size: 2 cropped at the right and bottom to a multiple of 8 pixels, 0 in tiles"
    assert said in caplog.text


def test_pixels_and_numbers_are_those_of_the_tokenizer(trained: Path, images: Path, tmp_path: Path) -> None:
    tables = reconstruct(trained, tmp_path / "out", images=str(images / "b"))
    tokenizer = vqf.load(str(trained))
    assert isinstance(tokenizer, Tokenizer)
    squares = []
    for name in ("other", "photo"):
        original = torch.from_numpy(pixels(images / "b" / f"{name}.png").copy()).permute(2, 0, 1)[None] / 127.5 - 1
        original = original[..., : original.shape[2] // 8 * 8, : original.shape[3] // 8 * 8]
        decoded = tokenizer.decode(tokenizer.encode(original))
        expected = ((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_allclose(pixels(tmp_path / "out" / "reconstructions" / f"{name}.png"), expected, atol=1)
        squares.append(((decoded - original).double() / 2).square().mean())
    (values,) = tables.values()
    assert values["psnr"] == pytest.approx(float(-10 * torch.stack(squares).log10().mean()), abs=1e-3)


def test_large_images_pass_in_tiles(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vqf")
    (tmp_path / "images").mkdir()
    smooth = Image.effect_noise((40, 40), 90).resize((328, 304), Image.Resampling.BICUBIC).convert("RGB")
    smooth.save(tmp_path / "images" / "large.png")
    reconstruct(trained, tmp_path / "whole", images=str(tmp_path / "images"))
    monkeypatch.setattr(tiled_encoding, "TILE_PIXELS", 264)
    reconstruct(trained, tmp_path / "tiled", images=str(tmp_path / "images"))
    assert "1 in tiles of 264 pixels" in caplog.text
    results = (tmp_path / name / "reconstructions" / "large.png" for name in ("whole", "tiled"))
    whole, tiled = (pixels(path).astype(int) for path in results)
    assert tiled.shape == (304, 328, 3) and np.abs(whole - tiled).mean() < 1


def test_training_size_scales_and_numbers_them(trained: Path, images: Path, tmp_path: Path) -> None:
    (title,) = reconstruct(trained, tmp_path / "out", images=str(images), size="training")
    files = sorted((tmp_path / "out" / "reconstructions").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(5)]
    assert {Image.open(path).size for path in files} == {(16, 16)}
    assert title == "reconstruction of 5 images at 16 x 16 pixels"


def test_an_unreadable_or_tiny_image_is_named_and_counted(
    trained: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes((images / "b" / "photo.png").read_bytes())
    (folder / "broken.png").write_bytes(b"nothing")
    Image.new("RGB", (7, 30)).save(folder / "tiny.png")
    caplog.set_level(logging.INFO, "vqf")
    (title,) = reconstruct(trained, tmp_path / "out", images=str(folder))
    assert title == "reconstruction of 1 images at their own size" and "2 left out" in caplog.text
    assert "'broken.png' is left out" in caplog.text
    assert "'tiny.png' is left out (7 x 30 pixels, below the stride 8)" in caplog.text
    (folder / "good.png").unlink()
    with pytest.raises(UserError, match="none of the 2 images can be reconstructed"):
        reconstruct(trained, tmp_path / "none", images=str(folder))


def test_a_folder_that_is_not_there_is_named_as_it_was_typed(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^images=.*nowhere: no such folder; give a folder of images$"):
        reconstruct(trained, tmp_path / "out", images=str(tmp_path / "nowhere"))


def test_size_own_needs_files(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^size=own: .*; give images=FOLDER, too"):
        reconstruct(trained, tmp_path / "out", size="own")


NAMES = ["a.png", "a.jpg", "a.png.jpg", "b/a.png", "a.jpg-2.png", "a.jpg.png", "a"]


@given(st.lists(st.sampled_from(NAMES), unique=True))
def test_no_two_results_have_one_name(names: list[str]) -> None:
    written = output_names(names)
    assert len(set(written)) == len(written) == len(names)
    assert all(result.startswith(name.rpartition(".")[0] or name) for name, result in zip(names, written, strict=True))

"""Images that are not square, from files to samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.errors import UserError
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.sample import SamplePipeline
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.registry import build

HEIGHT, WIDTH = 16, 24
WIDE = [*(each for each in TINY if not each.startswith(("data=", "image_size="))), f"image_size=[{HEIGHT},{WIDTH}]"]
ATTENDS = ["model.encoder.attention=[2]", "model.decoder.attention=[2]"]  # the rows of the grid, 2 x 3 codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stage 1 and stage 2 on images of many shapes, light on the left."""
    folder = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 90, (int(rng.integers(12, 60)), int(rng.integers(12, 60)), 3), np.uint8)
        pixels[:, : pixels.shape[1] // 2] += 160
        path = folder / "images" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    data = ["data=folder", f"data.root={folder / 'images'}", "data.validation_last=4", "data.flip=false"]
    first, second = folder / "stage1", folder / "stage2"
    Stage1(compose(*WIDE, *data, *ATTENDS), first).run()
    Stage2(compose(*TINY, "pipeline=stage2", f"run={first}", "data=folder", *data[1:]), second).run()
    return first, second


def test_models_know_height_and_width(runs: tuple[Path, Path]) -> None:
    tokenizer, generator = (vqf.load(run) for run in runs)
    assert isinstance(tokenizer, Tokenizer) and isinstance(generator, Generator)
    assert (tokenizer.image_size, tokenizer.layout.grid) == ((HEIGHT, WIDTH), (2, 3))
    assert generator.tokenizer.layout.grid == (2, 3)
    assert [bool(len(level.attn)) for level in tokenizer.encoder.down][-1]
    images = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    indices = tokenizer.encode(images)
    assert indices.shape == (2, 2, 3)
    assert tokenizer.decode(indices).shape == images.shape
    assert torch.equal(tokenizer.encode_tokens(images), indices.flatten(1))
    assert torch.equal(tokenizer.decode_tokens(tokenizer.encode_tokens(images)), tokenizer.decode(indices))
    assert generator.sample(3, seed=1).shape == (3, 3, HEIGHT, WIDTH)


def test_rows_and_columns_are_not_mixed_up(runs: tuple[Path, Path]) -> None:
    """The images are light on the left: so are their reconstructions, by columns and not by rows."""
    tokenizer = vqf.load(runs[0])
    images = torch.full((1, 3, HEIGHT, WIDTH), -0.9)
    images[..., : WIDTH // 2] = 0.9
    reconstructions = tokenizer(images).reconstructions
    left, right, top, bottom = (
        reconstructions[..., :12].mean(),
        reconstructions[..., 12:].mean(),
        reconstructions[..., :8, :].mean(),
        reconstructions[..., 8:, :].mean(),
    )
    assert left - right > 4 * abs(top - bottom)


def test_any_size_that_the_stride_divides(runs: tuple[Path, Path]) -> None:
    tokenizer = vqf.load(runs[0])
    for size in ((24, 16), (16, 16), (8, 40)):
        images = torch.rand(1, 3, *size) * 2 - 1
        assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    with pytest.raises(ValueError, match=r"multiples of the encoder's stride 8, not 18 x 24"):
        tokenizer.encode(torch.rand(1, 3, 18, 24))


def test_weights_of_a_square_run_fit(runs: tuple[Path, Path]) -> None:
    config = compose(*TINY, *ATTENDS)
    square, wide = (build_tokenizer(config.model, size) for size in (16, (HEIGHT, WIDTH)))
    wide.load_state_dict(square.state_dict())
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(square.eval().encode(images), wide.eval().encode(images))


def test_reconstructions_and_samples_on_disk(runs: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = runs
    Reconstruct(compose("pipeline=reconstruct", f"run={first}", "logger=[]", "metric=[psnr]"), tmp_path / "r").run()
    written = list((tmp_path / "r" / "reconstructions").iterdir())
    assert len(written) == 4
    assert {Image.open(path).size for path in written} == {(WIDTH, HEIGHT)}
    SamplePipeline(compose("pipeline=sample", f"run={second}", "logger=[]"), tmp_path / "s", count=3, label="bee").run()
    written = list((tmp_path / "s" / "samples").iterdir())
    assert {Image.open(path).size for path in written} == {(WIDTH, HEIGHT)}
    assert len(written) == 3


def test_larger_images_need_the_sliding_window_sampler(runs: tuple[Path, Path]) -> None:
    generator = vqf.load(runs[1])
    assert isinstance(generator, Generator)
    with pytest.raises(UserError, match=r"was trained on images of 16 x 24 pixels, not 24 x 40"):
        generator.sample(1, size=[24, 40])
    generator.sampler = build("sampler", {"name": "sliding_window"})
    assert generator.sample(1, size=[24, 40]).shape == (1, 3, 24, 40)


def test_the_checkpoint_state_has_the_image_size(runs: tuple[Path, Path]) -> None:
    for run in runs:
        states = [json.loads(path.read_text()) for path in run.glob("checkpoints/*/state.json")]
        assert states and {tuple(state["image_size"]) for state in states} == {(HEIGHT, WIDTH)}

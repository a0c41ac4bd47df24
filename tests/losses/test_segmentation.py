"""Class maps: the loss equals its formula, unsuitable losses are refused, and training works by default."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY, lines
from vqf.errors import UserError
from vqf.losses.perceptual import FeatureLoss
from vqf.losses.segmentation import BCE
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.full import Full
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.stage1 import Stage1

PLAIN = ["model.discriminator=null", "model.adversary=null"]


def test_the_formula() -> None:
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.one_hot(logits.argsort(1)[:, 2], 5).permute(0, 3, 1, 2).double()
    chance = 1 / (1 + (-logits).exp())
    expected = -(maps * chance.log() + (1 - maps) * (1 - chance).log()).mean()
    torch.testing.assert_close(BCE()(logits, maps), expected, rtol=1e-12, atol=1e-12)


def test_a_depth_map_is_compared_as_grey() -> None:
    loss = FeatureLoss()
    one, other = torch.rand(2, 2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grey = loss(one.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1))
    torch.testing.assert_close(loss(one, other), grey)
    assert float(grey) > 0.1


@pytest.fixture(params=[2, 3, 4])
def overrides(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Stripes of classes, and images of them."""
    classes: int = request.param
    for i in range(24):
        numbers = ((np.arange(32)[:, None] + np.arange(32) * (i % 3) + i) // 7 % classes).astype(np.uint8)
        for name, pixels in (("conditions", numbers), ("images", numbers * 60)):
            (tmp_path / "data" / name).mkdir(exist_ok=True, parents=True)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    common = [each for each in TINY if not each.startswith(("data=", "model/loss="))]
    options = [f"data.root={tmp_path / 'data'}", "data.maps=labels", f"data.labels={classes}"]
    return [*common, "data=pairs", *options, "data.validation_fraction=0.3", "evaluate.count=4"]


def test_maps_of_classes_train_by_default(overrides: list[str], tmp_path: Path) -> None:
    """By one command, whatever losses and discriminator its images have; and all that is measured can be."""
    several = [*overrides, "model/conditioner=spatial", "pipeline=full", "metric=[psnr,ssim,features,usage]"]
    Full(
        compose(*several, "steps=2", "optimizer.lr=1e-2", "maps.steps=150", "checkpoint.every=50", "log.every=10"),
        tmp_path / "run",
    ).run()
    maps = vqf.load(tmp_path / "run" / "maps")
    assert isinstance(maps, Tokenizer)
    assert f"data.labels={maps.channels}" in overrides
    losses = [line["bce"] for line in lines(tmp_path / "run" / "maps") if "bce" in line]
    share = torch.tensor(1 / maps.channels)
    blind = -(share * share.log() + (1 - share) * (1 - share).log())  # of what knows how often classes occur
    assert losses[-1] < 0.9 * blind
    assert not any("d_loss" in line for line in lines(tmp_path / "run" / "maps"))
    config = compose("pipeline=reconstruct", f"run={tmp_path / 'run' / 'maps'}", "metric=[features]", "logger=[]")
    Reconstruct(config, tmp_path / "back", count=2).run()


def test_what_cannot_compare_them_is_one_line(overrides: list[str], tmp_path: Path) -> None:
    cure = r"model/loss=\[bce\] model.discriminator=null model.adversary=null"
    for others, message in (
        (
            ["model/loss=[l1,features]", "target=condition"],
            rf"model\.loss\.features: compares images of 1 or 3 channels, .* classes.* {cure}",
        ),
        (
            ["model/loss=[bce]", "target=condition"],
            "model.loss.bce: trains the decoder to output logits, which a discriminator .* model.discriminator=null",
        ),
        (["model/loss=[bce]", *PLAIN], "model.loss.bce: compares class maps, not images of 3"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Stage1(compose(*overrides, *others), tmp_path).run()
        assert "\n" not in str(caught.value)
    Stage1(compose(*overrides, "target=condition", "model/loss=[bce]", *PLAIN, "steps=2"), tmp_path / "run").run()

"""The TensorBoard logger, read back by TensorBoard's own reader."""

import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.composing import compose
from tests.training.test_trainer import TINY, KilledError, interrupt_after
from vqf.errors import UserError
from vqf.loggers.image_grid import make_grid
from vqf.pipelines.stage1 import Stage1
from vqf.registry import build


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return OmegaConf.create({"steps": 4321, "secret": "${oc.env:VQF_TEST_SECRET}", "absent": "???"})


def make(run_dir: Path, config: DictConfig | None = None) -> Any:
    return build("logger", {"name": "tensorboard"}, run_dir=run_dir, config=config or OmegaConf.create({}), subrun="")


def read(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run_dir).Scalars(key)]


def test_numbers_images_and_the_unresolved_config_come_back(
    tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQF_TEST_SECRET", "very-secret-words")
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    logger = make(tmp_path, config)
    for step in (5, 10):
        logger.scalars(step, {"loss": step / 4, "validation/psnr": 20.25})
        logger.images(step, "samples", images)
    logger.close()
    assert curve(tmp_path, "loss") == [(5, 1.25), (10, 2.5)]
    assert curve(tmp_path, "validation/psnr") == [(5, 20.25), (10, 20.25)]
    events = read(tmp_path).Images("samples")
    assert [event.step for event in events] == [5, 10]
    for event in events:
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(np.asarray(image), np.asarray(make_grid(images)))
    (text,) = read(tmp_path).Tensors("config/text_summary")
    (words,) = text.tensor_proto.string_val
    assert b"4321" in words and b"${oc.env:VQF_TEST_SECRET}" in words and b"very-secret-words" not in words


def test_steps_that_are_done_again_replace_those_of_the_killed_process(tmp_path: Path) -> None:
    killed = make(tmp_path)
    for step in (1, 2, 3, 4, 5):
        killed.scalars(step, {"loss": 100.0 + step})
        killed.images(step, "samples", torch.full((1, 3, 4, 4), -1.0))
    killed.close()
    again = make(tmp_path)
    for step in (4, 5, 6):  # the checkpoint was of step 3
        again.scalars(step, {"loss": 200.0 + step})
        again.images(step, "samples", torch.full((1, 3, 4, 4), 1.0))
    again.close()
    assert curve(tmp_path, "loss") == [(1, 101), (2, 102), (3, 103), (4, 204), (5, 205), (6, 206)]
    assert [event.step for event in read(tmp_path).Images("samples")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_killed_and_resumed_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*TINY, "logger=[tensorboard,images]", "evaluate.every=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Stage1(compose(*options), whole).run()
    with monkeypatch.context() as patch:
        interrupt_after(5, patch, "stage1")
        with pytest.raises(KilledError):
            Stage1(compose(*options), cut).run()
    Stage1(compose(*options, "resume=true"), cut).run()
    assert curve(cut, "loss") == curve(whole, "loss") and len(curve(cut, "loss")) == 6
    assert curve(cut, "validation/psnr") == curve(whole, "validation/psnr")
    assert [event.step for event in read(cut).Images("reconstructions")] == [3, 6]


def test_a_run_of_which_nothing_is_logged_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *more: None if name == "tensorboard" else find(name, *more)  # noqa: E731
    monkeypatch.setattr("vqf.loggers.tensorboard.find_spec", hidden)
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert str(caught.value) == 'logger=tensorboard: the package is missing; pip install "vqf[tensorboard]"'


def test_all_loggers_work_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with caplog.at_level(logging.INFO, logger="vqf"):
        words = ["steps=2", "model.adversary.start=1", "logger=[console,images,wandb,tensorboard]"]
        Stage1(compose(*TINY, *words), tmp_path / "run").run()
    assert len(curve(tmp_path / "run", "loss")) == 2
    assert len(list((tmp_path / "run" / "wandb").rglob("*.wandb"))) == 1
    assert (tmp_path / "run" / "images" / "reconstructions-latest.png").is_file()
    assert any("validation:" in record.getMessage() for record in caplog.records)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and record.name == "vqf"]

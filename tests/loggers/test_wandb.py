"""Weights & Biases for real, offline, and what happens when it fails."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError
from vqf.registry import build, find


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return OmegaConf.create({"steps": 4321, "secret": "${oc.env:VQF_TEST_SECRET}", "absent": "???"})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQF_TEST_SECRET", "very-secret-words")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def make(run_dir: Path, config: DictConfig, **options: object) -> Any:
    return build("logger", {"name": "wandb", **options}, run_dir=run_dir, config=config)


def use(logger: Any) -> None:
    for step in (5, 5, 2):
        logger.scalars(step, {"loss": 0.5, "validation/psnr": 20.25})
        logger.images(step, "samples", torch.zeros(2, 3, 8, 8))
    logger.close()


def test_an_offline_run_holds_numbers_pictures_and_the_unresolved_config(
    tmp_path: Path, config: DictConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vqf"):
        use(make(tmp_path / "new", config, project="trial", tags=["one", "two"]))
    wandb.teardown()  # waits until the last byte is on disk
    assert not [record for record in caplog.records if record.name == "vqf"]
    (record,) = (tmp_path / "new").rglob("*.wandb")
    content = record.read_bytes()
    for words in (b"validation/psnr", b"20.25", b"trial", b"two", b"4321", b"${oc.env:VQF_TEST_SECRET}"):
        assert words in content
    assert b"very-secret-words" not in content
    assert len(list((tmp_path / "new").rglob("*.png"))) >= 1


def test_disabled_leaves_nothing_to_sync(tmp_path: Path, config: DictConfig) -> None:
    use(make(tmp_path, config, mode="disabled"))
    assert not list(tmp_path.rglob("*.wandb"))


class Broken:
    """A run that fails in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method, self.calls = method, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: object, **kwargs: object) -> None:
            if name == self.method:
                self.calls += 1
                raise wandb.errors.CommError("the server is gone")

        return call


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_a_failure_is_said_once_and_then_it_is_quiet(
    tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    broken = Broken(method)
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    with caplog.at_level(logging.WARNING, logger="vqf"):
        use(make(tmp_path, config))
    assert broken.calls == 1
    assert len(caplog.records) == 1
    assert "the server is gone" in caplog.records[0].getMessage()


def test_a_wandb_that_does_not_start_does_not_stop_the_run(
    tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_: object) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING, logger="vqf"):
        use(make(tmp_path, config, mode="online"))
    assert [("api_key" in record.getMessage()) for record in caplog.records] == [True]


def test_an_interrupt_is_not_swallowed(tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, config)


def test_no_option_takes_a_key() -> None:
    assert set(find("logger", "wandb").options) == {"mode", "project", "entity", "group", "tags"}


def test_modes_are_checked(tmp_path: Path, config: DictConfig) -> None:
    with pytest.raises(UserError, match="offline"):
        make(tmp_path, config, mode="offlin")

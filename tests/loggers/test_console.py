"""The console logger prints the metrics of every validation in one line."""

import logging
from pathlib import Path

import pytest
import torch

from vqf.registry import build


def test_validation_metrics_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = build("logger", {"name": "console"}, run_dir=tmp_path, config=None)
    with caplog.at_level(logging.INFO, logger="vqf"):
        logger.scalars(40, {"loss": 3.0})
        logger.scalars(50, {"loss": 3.0, "validation/psnr": 21.23456, "validation/dead_codes": 12.0})
        logger.images(50, "samples", torch.zeros(1, 3, 4, 4))
        logger.close()
    assert [record.getMessage() for record in caplog.records] == ["step 50, validation:  psnr 21.23  dead_codes 12"]
    assert list(tmp_path.iterdir()) == []

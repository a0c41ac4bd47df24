"""Run pipelines inside a test."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tests.support.composing import compose
from vqf.config.settings import check_config, fill_missing_groups
from vqf.registry import build, flat_component

# Folders, others in every test: set afterwards, so that what the other words compose can be kept.
PLACES = re.compile(r"(path|run|resume|data\.root)=(.*)")


@cache
def composed(*overrides: str) -> DictConfig:
    """Compose a command line once; copy it before changing it."""
    return fill_missing_groups(compose(*overrides))


def run(run_dir: Path, *overrides: str) -> Any:
    """Run what a command line of these words would, in `run_dir`, and return the pipeline."""
    places = [found for each in overrides if (found := PLACES.fullmatch(each))]
    words = [each for each in overrides if not PLACES.fullmatch(each)]
    config = composed("device=cpu", "logger=[]", "metric=[psnr]", *words).copy()
    for found in places:
        OmegaConf.update(config, found[1], found[2])
    check_config(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    pipeline = build("pipeline", flat_component("pipeline", config), config=config, run_dir=run_dir)
    pipeline.run()
    return pipeline

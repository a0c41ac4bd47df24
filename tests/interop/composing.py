"""Run pipelines inside a test."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.composing import compose
from vqf.registry import build, flat_node
from vqf.settings import check_config, complete


def run(run_dir: Path, *overrides: str) -> Any:
    """Run what a command line of these words would, in `run_dir`, and return the pipeline."""
    config = complete(compose("device=cpu", "logger=[]", "metric=[psnr]", *overrides))
    if OmegaConf.select(config, "hydra") is not None:
        del config["hydra"]
    check_config(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    pipeline = build("pipeline", flat_node("pipeline", config), config=config, run_dir=run_dir)
    pipeline.run()
    return pipeline

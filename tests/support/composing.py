"""Compose vqf's config inside a test."""

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

import vqf  # noqa: F401  (registers the components)
from vqf.run import config_dir


def compose(*overrides: str) -> DictConfig:
    """Compose the config of a command line."""
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return hydra_compose("config", overrides=list(overrides))

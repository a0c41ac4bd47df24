"""Compose vqf's config inside a test."""

import pickle
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

import vqf  # noqa: F401  (registers the components)
from vqf import registry
from vqf.run import config_dir

_composed: dict[tuple[Any, ...], tuple[bytes, list[registry.Component]]] = {}


def compose(*overrides: str) -> DictConfig:
    """Compose the config of a command line; words that were composed of these components before give a copy of that."""
    components = [each for named in registry._components.values() for each in named.values()]
    key = (overrides, *sorted(map(id, components)))
    if key not in _composed:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            config = hydra_compose("config", overrides=list(overrides))
        _composed[key] = (pickle.dumps(config), components)  # which live on, or another might have the place of one
    return pickle.loads(_composed[key][0])

"""Compose vqf's config inside a test."""

import pickle
import re
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import vqf  # noqa: F401  (registers the components)
from vqf import registry
from vqf.run import config_dir

# Folders, others in every test: set afterwards, so that what the other words compose can be kept.
PLACES = re.compile(r"(data\.root|path|run|run_dir|to)=(/[\w/.-]+)")

_composed: dict[tuple[Any, ...], tuple[bytes, list[registry.Component]]] = {}


def compose(*overrides: str) -> DictConfig:
    """Compose the config of a command line; words that were composed of these components before give a copy of that."""
    places = [found.groups() for each in overrides if (found := PLACES.fullmatch(each))]
    config = _compose([each for each in overrides if not PLACES.fullmatch(each)])
    if not all(_holds(config, *place.rpartition(".")[::2]) for place, _ in places):
        return _compose(list(overrides))  # Hydra says what is wrong
    for place, folder in places:
        OmegaConf.update(config, place, folder)
    return config


def _holds(config: DictConfig, parent: str, key: str) -> bool:
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and key in node.keys()  # noqa: SIM118  (what has no value yet is a key, too)


def _compose(overrides: list[str]) -> DictConfig:
    components = [each for named in registry._components.values() for each in named.values()]
    key = (*overrides, *sorted(map(id, components)))
    if key not in _composed:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            config = hydra_compose("config", overrides=overrides)
        _composed[key] = (pickle.dumps(config), components)  # which live on, or another might have the place of one
    return pickle.loads(_composed[key][0])

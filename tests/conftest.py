"""Fixtures for every test."""

import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins

from vqf import registry

# The processes of xdist share the cores. And with more threads `threads=auto` would choose by the clock.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Minutes each. A process of xdist takes a whole file: these begin first, or the last one would be waited for alone.
LONGEST = (
    "distributed/test_training.py",
    "pipelines/test_kill.py",
    "test_launchers.py",
    "pipelines/test_plan.py",
    "pipelines/shards/test_shard_faults.py",
    "pipelines/test_evaluate.py",
    "pipelines/test_compare.py",
    "pipelines/test_conditions.py",
    "interop/test_export.py",
    "project/test_style.py",
    "test_run.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register what it likes; all of it is forgotten afterwards."""
    Plugins.instance()  # on first use Hydra adds nodes of its own, which must outlive the test
    known = {kind: dict(components) for kind, components in registry._components.items()}
    monkeypatch.setattr(registry, "_components", known)
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.deepcopy(ConfigStore.instance().repo))


@pytest.fixture
def own_job() -> Iterator[None]:
    """Let a test run a whole command line in this process; what Hydra keeps, and does to logging, ends with it."""
    root = logging.getLogger()
    handlers, level = root.handlers.copy(), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
    HydraConfig.instance().cfg = None

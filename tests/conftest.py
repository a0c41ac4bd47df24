"""Fixtures for every test."""

import copy
import os

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from vqf import registry

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes side by side share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register what it likes; all of it is forgotten afterwards."""
    Plugins.instance()  # on first use Hydra adds nodes of its own, which must outlive the test
    known = {kind: dict(components) for kind, components in registry._components.items()}
    monkeypatch.setattr(registry, "_components", known)
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.deepcopy(ConfigStore.instance().repo))

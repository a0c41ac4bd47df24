"""Comparisons with other packages skip where those are not installed; VQF_PEERS=1 says that they are."""

import os
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
PEERS = [*PROJECT["optional-dependencies"]["peers"], "lpips"]


def missing(requirements: list[str]) -> list[str]:
    """Return the requirements that the installed packages do not meet."""
    return [each for each in requirements if not _met(Requirement(each))]


def _met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(distribution(requirement.name).version, prereleases=True)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(os.environ.get("VQF_PEERS") != "1", reason="VQF_PEERS=1 demands the peers")
def test_no_comparison_is_skipped() -> None:
    assert missing(PEERS) == [], 'pip install -e ".[peers]"'


def test_a_missing_peer_would_be_noticed() -> None:
    assert missing(["torch>=2", "torch>=1000", "no-such-package"]) == ["torch>=1000", "no-such-package"]


def test_a_missing_peer_is_an_error_where_peers_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.parity.peers import need

    monkeypatch.setenv("VQF_PEERS", "1")
    with pytest.raises(ModuleNotFoundError):
        need("no_such_package")
    monkeypatch.delenv("VQF_PEERS")
    with pytest.raises(pytest.skip.Exception):
        need("no_such_package")

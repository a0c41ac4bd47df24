"""CONTRIBUTING.md names every room, every kind of component, and only what is there."""

import re
from pathlib import Path

import pytest

from vqf import protocols
from vqf.registry import KINDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vqf"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = re.findall(r"`([\w/]+(?:\.\w+)+|[\w/]+/)`", PAGE)
ROOMS = sorted(path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())


@pytest.mark.parametrize("room", [path.name for path in ROOMS if path.name != "__init__.py"])
def test_every_room_is_named(room: str) -> None:
    assert any(name.rstrip("/").endswith(room) for name in NAMED)


@pytest.mark.parametrize("name", sorted({name for name in NAMED if "/" in name and "." in name and "NAME" not in name}))
def test_every_file_is_there(name: str) -> None:
    rooms = [ROOT, PACKAGE, *(path for path in ROOMS if path.is_dir())]
    assert any((room / name).exists() for room in rooms)


def test_every_kind_has_a_room_and_a_protocol() -> None:
    rows = re.findall(r"^   \| ([\w, ]+) \| `(vqf/\S+)` \| (.*) \|$", PAGE, re.MULTILINE)
    kinds = {kind.replace("evaluation ", "") for row in rows for kind in row[0].split(", ")}
    assert kinds == set(KINDS)
    for _, room, named in rows:
        assert (ROOT / room).exists()
        assert all(hasattr(protocols, name) for name in re.findall(r"`(\w+)`", named))

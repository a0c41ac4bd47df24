"""Read the untrusted `manifest.json` of `pipeline=shard`, without invalid entries."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vqf.file_kinds import check_regular

MANIFEST_NAME = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder, empty if there is none."""
    try:
        check_regular(folder / MANIFEST_NAME)
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def listed_shards(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the valid entries of a manifest by shard name."""
    shards = manifest.get("shards")
    return {entry["name"]: entry for entry in shards if _is_shard(entry)} if isinstance(shards, list) else {}


def class_names(manifest: Mapping[str, Any]) -> list[str]:
    """Return the class names of a manifest, perhaps none."""
    classes = manifest.get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) else []


def _is_shard(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and isinstance(name := entry.get("name"), str)
        and PurePosixPath(name).name == name  # no folder: the name is joined to a path
        and type(entry.get("images")) is int
        and entry["images"] >= 0
    )

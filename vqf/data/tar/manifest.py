"""The `manifest.json` that pipeline=shard leaves beside shards: which there are, how many images, which hashes."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_NAME = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder; empty where there is none, or it is none of pipeline=shard."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def listed_shards(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what a manifest says of its shards, by their names; entries that make no sense are left out."""
    shards = content.get("shards")
    return {each["name"]: each for each in shards if _is_shard(each)} if isinstance(shards, list) else {}


def class_names(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes; none where it names none."""
    classes = content.get("classes")
    return [str(each) for each in classes] if isinstance(classes, list) else []


def _is_shard(entry: Any) -> bool:
    """Check an entry of a manifest that anybody may have written."""
    return (
        isinstance(entry, Mapping)
        and isinstance(name := entry.get("name"), str)
        and PurePosixPath(name).name == name
        and type(entry.get("images")) is int
        and entry["images"] >= 0
    )

"""Reads and verifies the files of a checkpoint folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.config.untrusted import check_no_interpolations
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.networks.file_content import DOWNLOAD_AGAIN, describe_substitute
from vqf.run_files.yaml_file import read_yaml

MANIFEST = "manifest.json"
STATE = "state.json"
REQUIRED_FILES = ("model.safetensors", "optimizers.pt", STATE, "config.yaml")


class BrokenCheckpointError(UserError):
    """A checkpoint with a missing, damaged or unreadable file."""


def verify_files(path: Path, entries: Mapping[str, Any]) -> None:
    """Compare the files of a checkpoint with the entries of its manifest.

    Raises:
        BrokenCheckpointError: If one is missing, changed or unlisted.
    """
    for name, entry in entries.items():
        file = path / name
        if Path(name).name != name or not file.is_file():  # a name with a folder would lead out of the checkpoint
            raise BrokenCheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != as_mapping(entry).get("size") or sha256_of_file(file) != entry.get("sha256"):
            raise BrokenCheckpointError(f"{path}: {name} {_describe_change(file, as_mapping(entry).get('size'))}")
    weights = [file.name for file in sorted(path.glob("*.safetensors"))]
    for name in (*REQUIRED_FILES, *weights):
        if name not in entries:
            raise BrokenCheckpointError(f"{path}: {name} is not in its manifest")


def _describe_change(file: Path, expected: Any) -> str:
    if substitute := describe_substitute(file):
        return f"is {substitute}"
    size = file.stat().st_size
    if isinstance(expected, int) and size < expected:
        return f"was cut short: {size:,} of {expected:,} bytes; {DOWNLOAD_AGAIN}"
    return "was changed after it was written (size or hash differ)"


def file_entry(file: Path) -> dict[str, Any]:
    """Entry of a file in the manifest."""
    return {"size": file.stat().st_size, "sha256": sha256_of_file(file)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        BrokenCheckpointError: If it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = describe_substitute(path) if path.is_file() else None
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({reason or error})") from error
    if not isinstance(content, dict):
        raise BrokenCheckpointError(f"{path.parent}: {path.name} is not a mapping")
    return content


def as_mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_config(path: Path) -> DictConfig:
    """Read the config of a checkpoint.

    Raises:
        BrokenCheckpointError: If it is none.
        UserError: If it has interpolations.
    """
    try:
        config = read_yaml(path)
    except (OSError, ValueError) as error:
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({error})") from error
    if not isinstance(config, DictConfig):
        raise BrokenCheckpointError(f"{path.parent}: {path.name} is not a config")
    check_no_interpolations(OmegaConf.to_container(config, resolve=False), path)
    return config

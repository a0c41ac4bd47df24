"""Readers of the JSON, YAML and text files of a run."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from vqf.run_files.aside import not_a_file, set_aside, warn_once
from vqf.run_files.shapes import INVALID, Shape, keep_valid
from vqf.run_files.yaml_file import read_yaml

MAX_NAMED = 8  # keys in one message


def read_record(path: Path, shape: Shape) -> dict[str, Any]:
    """Read what has the shape of a JSON object, and say what has not; {} if it is missing."""
    content, damage = _read_json(path, shape)
    if damage:
        warn_once(f"{path}: {damage}; left out")
    return content


def take_record(path: Path, shape: Shape) -> dict[str, Any]:
    """Read a JSON object that will be written anew; a damaged file is set aside.

    Raises:
        OSError: If it cannot be renamed.
    """
    content, damage = _read_json(path, shape)
    if damage:
        set_aside(path, damage)
    return content


def read_config_record(path: Path) -> DictConfig | ListConfig | None:
    """Read a config; None if it is missing, or damaged, which is said."""
    if not os.path.lexists(path):
        return None
    try:
        return read_yaml(path)
    except (OSError, ValueError) as error:
        warn_once(f"{path}: cannot be read ({_reason(error)}); left out")
        return None


def read_text(path: Path) -> str:
    """Read a text file; "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_tail(path: Path, size: int = 2**16) -> str:
    """Read the last bytes of a text file; "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return file.read(size).decode(errors="replace")


def evaluation_files(folder: Path) -> list[Path]:
    """List the files of pipeline=evaluate below a run."""
    return sorted(folder.glob("evaluations/*/*/metrics.json"))


def _read_json(path: Path, shape: Shape) -> tuple[dict[str, Any], str]:
    """Return what has the shape, and what is wrong with the rest; "" if nothing is."""
    if not path.is_file():
        return {}, not_a_file(path) if os.path.lexists(path) else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read ({_reason(error)})"
    if not isinstance(content, dict):
        return {}, "holds no JSON object"
    invalid: set[str] = set()
    valid = keep_valid(content, shape, invalid)
    named = sorted(f"'{key}'" for key in invalid)
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    damage = f"{', '.join(named[:MAX_NAMED])}{more}: not what vqf writes there" if named else ""
    return ({} if valid is INVALID else valid), damage


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).partition("\n")[0] or type(error).__name__

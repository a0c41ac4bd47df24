"""A folder of drawn pictures, each with the settings that decided it: what is there is never mixed with others."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vqf.batch import Batch
from vqf.config.diff import differing
from vqf.errors import UserError
from vqf.images import read_picture, save_picture
from vqf.registry import find
from vqf.runs.checkpoint import MANIFEST, Checkpoint

SETTINGS = "vqf"  # the text of a PNG that holds them


class PictureFolder:
    """Pictures by name.

    Args:
        folder: Where they lie.
        resume: Whether those that are there are kept.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.resume = folder, resume

    def has(self, pictures: Mapping[str, Mapping[str, Any]]) -> bool:
        """Tell whether pictures, given by name with their settings, are all there, and to be kept.

        Raises:
            UserError: If one was drawn with other settings: one line that names them.
        """
        return [self._has(self._path(name), settings) for name, settings in pictures.items()].count(False) == 0

    def _has(self, path: Path, settings: Mapping[str, Any]) -> bool:
        if not self.resume or not path.is_file():
            return False
        then = _said(path)
        if then is None:
            raise UserError(f"resume: {path} does not say how it was drawn; {_cure()}")
        if found := differing([OmegaConf.create(dict(each)) for each in (then, settings)]):
            words = ", ".join(f"{key} {before} → {now}" for key, (before, now) in found.items())
            raise UserError(f"resume: {path} was drawn with other settings: {words}; {_cure()}")
        return True

    def save(self, name: str, picture: Tensor, settings: Mapping[str, Any]) -> None:
        """Write a picture (C, H, W) with its settings."""
        said = PngInfo()
        said.add_text(SETTINGS, json.dumps(settings))
        save_picture(picture, self._path(name), said)

    def read(self, name: str) -> Tensor:
        """Return a picture (3, H, W) in [-1, 1]."""
        return read_picture(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"


def settings_of(checkpoint: Checkpoint, config: DictConfig, **others: Any) -> dict[str, Any]:
    """Return what decides every picture that a run's prior draws: weights, seed, sampler, scorer, and other options."""
    weights = hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()[:16]
    parts = {kind: _slow(kind, config.get(kind)) for kind in ("sampler", "scorer")}
    return {"weights": weights, "seed": config.seed, **parts, **others}


def _slow(kind: str, node: DictConfig | None) -> dict[str, Any] | None:
    """Return a node without the options that change no token."""
    if node is None:
        return None
    speed, plain = (
        getattr(find(kind, node.name).target, "speed_options", ()),
        OmegaConf.to_container(node, resolve=True),
    )
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in speed}


def digest(told: Batch | None, row: int) -> str | None:
    """Hash what one picture is drawn by."""
    if told is None:
        return None
    found = hashlib.sha256()
    for name, value in sorted(told.part(row, row + 1).named().items()):
        found.update(f"{name}{tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _said(path: Path) -> Any:
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return json.loads(file.info[SETTINGS])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def _cure() -> str:
    return "set them back, name another run_dir, or leave resume out to draw all of them anew"

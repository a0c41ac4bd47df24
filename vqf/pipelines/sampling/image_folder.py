"""A folder of drawn images, each with the settings that decided it: what is there is never mixed with others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vqf.batch import Batch
from vqf.config.diff import differing_options
from vqf.errors import UserError
from vqf.hashing import sha256_of_file, sha256_of_tensors
from vqf.images import read_image, save_image
from vqf.registry import find_component
from vqf.runs.checkpoint import MANIFEST, Checkpoint

PNG_SETTINGS_KEY = "vqf"  # the text of a PNG that holds them


class ResumableImageFolder:
    """Images by name.

    Args:
        folder: Where they lie.
        resume: Whether those that are there are kept.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.resume = folder, resume

    def has(self, images: Mapping[str, Mapping[str, Any]]) -> bool:
        """Tell whether images, given by name with their settings, are all there, and to be kept.

        Raises:
            UserError: If one was drawn with other settings: one line that names them.
        """
        return [self._has(self._path(name), settings) for name, settings in images.items()].count(False) == 0

    def _has(self, path: Path, settings: Mapping[str, Any]) -> bool:
        if not self.resume or not path.is_file():
            return False
        then = _read_settings(path)
        if then is None:
            raise UserError(f"resume: {path} does not say how it was drawn; {_resume_hint()}")
        if found := differing_options([OmegaConf.create(dict(each)) for each in (then, settings)]):
            words = ", ".join(f"{key} {before} → {now}" for key, (before, now) in found.items())
            raise UserError(f"resume: {path} was drawn with other settings: {words}; {_resume_hint()}")
        return True

    def save(self, name: str, image: Tensor, settings: Mapping[str, Any]) -> None:
        """Write an image (C, H, W) with its settings."""
        said = PngInfo()
        said.add_text(PNG_SETTINGS_KEY, json.dumps(settings))
        save_image(image, self._path(name), said)

    def read(self, name: str) -> Tensor:
        """Return an image (3, H, W) in [-1, 1]."""
        return read_image(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"


def sampling_settings(checkpoint: Checkpoint, config: DictConfig, **others: Any) -> dict[str, Any]:
    """Return what decides every image that a run's prior draws: weights, seed, sampler, scorer, and other options."""
    weights = sha256_of_file(checkpoint.path / MANIFEST)[:16]
    parts = {kind: _without_speed_options(kind, config.get(kind)) for kind in ("sampler", "scorer")}
    return {"weights": weights, "seed": config.seed, **parts, **others}


def _without_speed_options(kind: str, node: DictConfig | None) -> dict[str, Any] | None:
    """Return a node without the options that change no token."""
    if node is None:
        return None
    speed, plain = (
        getattr(find_component(kind, node.name).target, "speed_options", ()),
        OmegaConf.to_container(node, resolve=True),
    )
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in speed}


def condition_digest(condition: Batch | None, row: int) -> str | None:
    """Hash what one image is drawn by."""
    if condition is None:
        return None
    return sha256_of_tensors(condition.slice(row, row + 1).tensors())[:16]


def _read_settings(path: Path) -> Any:
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return json.loads(file.info[PNG_SETTINGS_KEY])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def _resume_hint() -> str:
    return "set them back, name another run_dir, or leave resume out to draw all of them anew"

"""A folder of sampled images, each with its settings."""

import json
from collections.abc import Callable, Mapping
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
from vqf.protocols import HasSpeedOptions
from vqf.registry import find_component
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.checkpoint_files import MANIFEST

PNG_SETTINGS_KEY = "vqf"  # text chunk of a PNG that stores the settings as JSON


class ResumableImageFolder:
    """Saves images by name; `resume` keeps existing ones."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.resume = folder, resume

    def fill(self, images: Mapping[str, Mapping[str, Any]], sample: Callable[[], Tensor]) -> None:
        """Make sure that a batch of images is in the folder.

        Args:
            images: Settings by name.
            sample: Samples the batch (B, C, H, W); called only if an image is missing.

        Raises:
            UserError: If an existing image has other settings.
        """
        # Look at all of them: other settings are an error even if an earlier image is missing.
        saved = [self._is_saved(self._path(name), settings) for name, settings in images.items()]
        if all(saved):
            return
        for (name, settings), image in zip(images.items(), sample(), strict=True):
            png_info = PngInfo()
            png_info.add_text(PNG_SETTINGS_KEY, json.dumps(settings))
            save_image(image, self._path(name), png_info)

    def read(self, name: str) -> Tensor:
        """Read an image (3, H, W) in [-1, 1]."""
        return read_image(self._path(name))

    def _is_saved(self, path: Path, settings: Mapping[str, Any]) -> bool:
        if not self.resume or not path.is_file():
            return False
        saved = _read_settings(path)
        if saved is None:
            raise UserError(f"resume: {path} has no sampling settings in it; {_resume_hint()}")
        if changes := differing_options([OmegaConf.create(dict(each)) for each in (saved, settings)]):
            differences = ", ".join(f"{key} {before} → {now}" for key, (before, now) in changes.items())
            raise UserError(f"resume: {path} was sampled with other settings: {differences}; {_resume_hint()}")
        return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"


def sampling_settings(checkpoint: Checkpoint, config: DictConfig, **options: Any) -> dict[str, Any]:
    """Return everything that determines a sampled image."""
    weights = sha256_of_file(checkpoint.path / MANIFEST)[:16]
    nodes = {kind: _without_speed_options(kind, config.get(kind)) for kind in ("sampler", "scorer")}
    return {"weights": weights, "seed": config.seed, **nodes, **options}


def _without_speed_options(kind: str, node: DictConfig | None) -> dict[str, Any] | None:
    if node is None:
        return None
    target = find_component(kind, node.name).target
    speed_options = target.speed_options if isinstance(target, HasSpeedOptions) else frozenset[str]()
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items() if key not in speed_options}


def condition_digest(condition: Batch | None, row: int) -> str | None:
    """Hash one row of a condition; None without one."""
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
    return "set them back, choose another run_dir, or leave resume out to sample all images again"

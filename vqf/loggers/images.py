"""The images logger."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vqf.loggers.image_grid import grid_columns, images_per_item, save_grid
from vqf.options.ranges import PositiveInt
from vqf.registry import register


@register("logger", "images")
class ImageLogger:
    """Writes `images/<name>-<step>.png` into the run's folder, and the newest again as `images/<name>-latest.png`.

    Args:
        run_dir: The run's folder.
        limit: Most images in a grid.
    """

    def __init__(self, run_dir: Path, *, limit: PositiveInt = 64) -> None:
        self.folder, self.limit = run_dir / "images", limit

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Ignore scalars."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = name.replace("/", "-")
        path = self.folder / f"{name}-{step:08d}.png"
        save_grid(images[: self._max_images(name)], path, grid_columns(name))
        shutil.copyfile(path, self.folder / f"{name}-latest.png")

    def close(self) -> None:
        """Do nothing."""

    def _max_images(self, name: str) -> int:
        return max(self.limit // images_per_item(name), 1) * images_per_item(name)

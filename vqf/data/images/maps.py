"""What the pixels of a map mean: colours, brightness, or numbers of classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqf.data.images.decode import MAX_PIXELS, UnreadableError, open_image, to_rgb, to_tensor

MapKind = Literal["rgb", "grey", "palette", "labels"]


@dataclass(frozen=True)
class MapDecoder:
    """How maps are read.

    Args:
        kind: `palette` is `rgb` whose colours are not to be mixed.
        labels: How many classes there are.
        unlabelled: The number that stands for no class; read as 0, while every other number moves up by one.
    """

    kind: MapKind = "rgb"
    labels: int = 0
    unlabelled: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "labels" and self.labels < 2:
            raise ValueError(f"labels={self.labels}, but maps=labels needs the number of classes, as data.labels=151")
        if self.kind != "labels" and (self.labels or self.unlabelled is not None):
            raise ValueError(f"labels and unlabelled are for maps=labels, not for maps={self.kind}")

    @property
    def num_classes(self) -> int:
        """How many classes there are, each with a channel of its own; 0 where a map is an image."""
        return self.labels

    def __call__(self, path: Path) -> Tensor:
        """Read a map whole, as stage 2 is shown it: (C, H, W), a pixel of the file for a pixel.

        Raises:
            UnreadableError: See `open_image` and `decode`.
        """
        return self.to_condition(self.to_tensor(self.open(path)))

    @property
    def options(self) -> dict[str, Any]:
        """The options of `data=pairs` that read maps so."""
        of_classes = {"labels": self.labels, "unlabelled": self.unlabelled} if self.kind == "labels" else {}
        return {"maps": self.kind, **of_classes}

    def open(self, path: Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Open a map and understand it.

        Raises:
            UnreadableError: See `open_image` and `decode`.
        """
        return self.decode(open_image(path, max_pixels=max_pixels))

    @property
    def resampling(self) -> Image.Resampling:
        """What maps are scaled with."""
        return Image.Resampling.BICUBIC if self.kind in ("rgb", "grey") else Image.Resampling.NEAREST

    def decode(self, image: Image.Image) -> Image.Image:
        """Turn a map into RGB, into 8 bits of grey, or into 32-bit numbers of classes.

        Raises:
            UnreadableError: If it holds no numbers, or one that is no class.
        """
        if self.kind == "labels":
            return Image.fromarray(self._class_indices(image))
        return to_rgb(image).convert("L") if self.kind == "grey" else to_rgb(image)

    def to_png(self, image: Image.Image) -> Image.Image:
        """Return what `decode` does in a mode that PNG keeps; read again, classes need no `unlabelled`.

        Raises:
            UnreadableError: See `decode`.
        """
        found = self.decode(image)
        if self.kind != "labels":
            return found
        return Image.fromarray(np.asarray(found).astype(np.uint8 if self.labels <= 256 else np.uint16))

    def to_tensor(self, image: Image.Image) -> Tensor:
        """Turn what `decode` returned into (1, H, W) or (3, H, W): in [-1, 1], or numbers of classes."""
        if self.kind == "labels":
            return torch.from_numpy(np.array(image, dtype=np.float32))[None]
        return to_tensor(image.convert("RGB"))[: 1 if self.kind == "grey" else 3]

    def to_condition(self, values: Tensor) -> Tensor:
        """Turn values into what stage 2 is shown, (C, H, W): the same, or a channel of 0 and 1 for every class."""
        if self.kind != "labels":
            return values
        return torch.zeros(self.labels, *values.shape[1:]).scatter_(0, values.long(), 1.0)

    def _class_indices(self, image: Image.Image) -> np.ndarray:
        if len(image.getbands()) > 1 or image.mode == "F":
            raise UnreadableError(f"{image.mode} pixels; a map of labels is grey, or has a palette")
        numbers = np.asarray(image).astype(np.int32)
        moved = ""
        if self.unlabelled is not None:
            numbers, moved = np.where(numbers == self.unlabelled, 0, numbers + 1), ", once moved up,"
        if (wrong := numbers[(numbers < 0) | (numbers >= self.labels)]).size:
            raise UnreadableError(f"the label {wrong.max()}{moved} is not below data.labels={self.labels}")
        return numbers

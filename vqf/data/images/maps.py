"""Decode condition maps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqf.data.images.decode import MAX_PIXELS, open_image, to_rgb, to_tensor
from vqf.data.images.pixel_values import PixelRange, UnreadableError

MapKind = Literal["rgb", "grey", "palette", "labels"]


@dataclass(frozen=True)
class MapDecoder:
    """Decodes the condition maps of a source.

    Args:
        kind: `palette` is `rgb` whose colors must not be mixed, `labels` a class number per pixel.
        labels: Number of classes, for `labels`.
        unlabelled: Number of pixels without a class: read as 0, while others move up by one.
        pixel_range: The values of black and white in gray maps of more than 8 bits, not for `labels`.
        range_option: Name of that option, for messages.
    """

    kind: MapKind = "rgb"
    labels: int = 0
    unlabelled: int | None = None
    pixel_range: PixelRange | None = None
    range_option: str = field(default="data.map_range", compare=False)

    def __post_init__(self) -> None:
        if self.kind == "labels" and self.labels < 2:
            raise ValueError(f"labels={self.labels}, but maps=labels needs the number of classes, as data.labels=151")
        if self.kind != "labels" and (self.labels or self.unlabelled is not None):
            raise ValueError(f"labels and unlabelled are for maps=labels, not for maps={self.kind}")
        if self.kind == "labels" and self.pixel_range is not None:
            raise ValueError("map_range is for gray maps, not for maps=labels, whose numbers are classes")

    @property
    def num_classes(self) -> int:
        """Number of one-hot channels; 0 for colors."""
        return self.labels

    @property
    def options(self) -> dict[str, Any]:
        class_options = {"labels": self.labels, "unlabelled": self.unlabelled} if self.kind == "labels" else {}
        return {"maps": self.kind, **class_options}

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        fields = self.kind, self.labels, self.unlabelled
        return fields if self.pixel_range is None else (*fields, self.pixel_range)

    @property
    def resampling(self) -> Image.Resampling:
        return Image.Resampling.BICUBIC if self.kind in ("rgb", "grey") else Image.Resampling.NEAREST

    def __call__(self, path: Path) -> Tensor:
        """Read a full map as a condition (C, H, W).

        Raises:
            UnreadableError: If it cannot be decoded.
        """
        return self.to_condition(self.to_tensor(self.open(path)))

    def open(self, path: Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Open a map and `decode` it.

        Raises:
            UnreadableError: If it cannot be decoded.
        """
        return self.decode(open_image(path, max_pixels=max_pixels))

    def decode(self, image: Image.Image) -> Image.Image:
        """Convert a map to RGB, 8-bit grayscale, or 32-bit class numbers.

        Raises:
            UnreadableError: If class numbers are invalid.
        """
        if self.kind == "labels":
            return Image.fromarray(self._class_indices(image))
        colors = to_rgb(image, self.pixel_range, self.range_option)
        return colors.convert("L") if self.kind == "grey" else colors

    def to_png(self, image: Image.Image) -> Image.Image:
        """Decode a map into a mode of PNG, to be read without `unlabelled`.

        Raises:
            UnreadableError: As in `decode`.
        """
        decoded = self.decode(image)
        if self.kind != "labels":
            return decoded
        return Image.fromarray(np.asarray(decoded).astype(np.uint8 if self.labels <= 256 else np.uint16))

    def to_tensor(self, image: Image.Image) -> Tensor:
        """Convert a decoded map to (3, H, W) or (1, H, W) in [-1, 1], or to class numbers (1, H, W), all float32."""
        if self.kind == "labels":
            return torch.from_numpy(np.array(image, dtype=np.float32))[None]
        return to_tensor(image.convert("RGB"))[: 1 if self.kind == "grey" else 3]

    def to_condition(self, values: Tensor) -> Tensor:
        """Convert the values of `to_tensor` to (C, H, W), class numbers one-hot."""
        if self.kind != "labels":
            return values
        return torch.zeros(self.labels, *values.shape[1:]).scatter_(0, values.long(), 1.0)

    def _class_indices(self, image: Image.Image) -> np.ndarray:
        if len(image.getbands()) > 1 or image.mode == "F":
            raise UnreadableError(f"{image.mode} pixels; a map of labels is grayscale, or has a palette")
        numbers = np.asarray(image).astype(np.int32)
        shifted = ""
        if self.unlabelled is not None:
            numbers, shifted = np.where(numbers == self.unlabelled, 0, numbers + 1), ", once moved up by unlabelled,"
        if (wrong := numbers[(numbers < 0) | (numbers >= self.labels)]).size:
            raise UnreadableError(f"the label {wrong.max()}{shifted} is not below data.labels={self.labels}")
        return numbers

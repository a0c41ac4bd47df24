"""Samples without files, presented as image files."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vqf.batch import Sample, Size
from vqf.dataloading.image_files import ImageFileLike, ImageFileSplit
from vqf.images import to_pil_image
from vqf.protocols import Split


def as_image_file(split: Split, index: int, classes: bool = False) -> ImageFileLike:
    """Return an image's file, or its sample in epoch 0 as one; `classes` marks class maps, one channel each."""
    if isinstance(split, ImageFileSplit):
        return split.file(index)
    sample = split.item(0, index)
    return RenderedImageFile(sample) if sample.condition is None else RenderedPairFile(sample, classes=classes)


@dataclass(frozen=True)
class RenderedImageFile:
    """An `ImageFileLike` of a sample; it has no bytes to copy."""

    sample: Sample
    name: str = ""

    @property
    def label(self) -> int | None:
        return self.sample.label

    def load_image(self) -> Image.Image:
        return to_pil_image(self.sample.image)

    def read_bytes(self) -> bytes:
        raise AssertionError("format=original is refused where there are no files")

    def probe(self, content: bytes) -> tuple[str, str, int, int, float, float]:
        raise AssertionError("format=original is refused where there are no files")


@dataclass(frozen=True)
class RenderedPairFile(RenderedImageFile):
    """A `PairFileLike` of a sample; its map is RGB, gray, or has one channel per class."""

    classes: bool = False

    def load_map(self, shape: Size) -> Image.Image:
        condition = self.sample.condition
        assert condition is not None, "every sample of a split has the same fields"
        if self.classes:
            labels = condition.argmax(0).numpy()
            return Image.fromarray(labels.astype(np.uint8 if len(condition) <= 256 else np.uint16))
        image = to_pil_image(condition)
        return image.convert("L") if len(condition) == 1 else image

    def read_map(self) -> tuple[bytes, str]:
        raise AssertionError("format=original is refused where there are no files")

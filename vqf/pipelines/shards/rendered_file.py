"""Pictures of a source without files, as if they were some."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vqf.batch import Sample, Size
from vqf.dataloading.image_files import Files, PictureFile
from vqf.images import to_image
from vqf.protocols import Split


def file_of(split: Split, index: int, classes: bool = False) -> PictureFile:
    """Return a picture as the file that it is, or as if it were one; `classes` says what a drawn map's channels are."""
    if isinstance(split, Files):
        return split.file(index)
    sample = split.item(0, index)
    return DrawnFile(sample) if sample.condition is None else DrawnPair(sample, classes=classes)


@dataclass(frozen=True)
class DrawnFile:
    """A picture of a source without files, as it looks in epoch 0: what a `PictureFile` is, but for the file."""

    sample: Sample
    name: str = ""

    @property
    def label(self) -> int | None:
        return self.sample.label

    def picture(self) -> Image.Image:
        return to_image(self.sample.image)

    def stored(self) -> bytes:
        raise AssertionError("format=original is refused where there are no files")

    def facts(self, content: bytes) -> tuple[str, str, int, int]:
        raise AssertionError("format=original is refused where there are no files")


@dataclass(frozen=True)
class DrawnPair(DrawnFile):
    """With its map, of colours or grey, or of classes, which have a channel each."""

    classes: bool = False

    def map(self, shape: Size) -> Image.Image:
        condition = self.sample.condition
        assert condition is not None, "every sample of a split has the same fields"
        if self.classes:
            numbers = condition.argmax(0).numpy()
            return Image.fromarray(numbers.astype(np.uint8 if len(condition) <= 256 else np.uint16))
        image = to_image(condition)
        return image.convert("L") if len(condition) == 1 else image

    def stored_map(self) -> tuple[bytes, str]:
        raise AssertionError("format=original is refused where there are no files")

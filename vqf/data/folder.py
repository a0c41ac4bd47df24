"""A folder of images: any number of subfolders, any size, any mode."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vqf.batch import Size, pair
from vqf.data.files.dataset import ImageSplit
from vqf.data.files.listing import scan, split_by_lists, split_files
from vqf.data.files.packed import File, PackedStrings, gc_paused
from vqf.data.images.augment import DEFAULT_CROP_AREA, DEFAULT_CROP_RATIO, NO_JITTER, Augmentation, Crop, Resize
from vqf.data.images.decode import EXTENSIONS, MAX_PIXELS, Animated
from vqf.data.images.maps import MapDecoder
from vqf.data.labels import class_numbers
from vqf.errors import EmptySplitError, UserError, unknown_message
from vqf.registry import register

log = logging.getLogger("vqf")

COUNT_LABELS = {"train": "training images", "validation": "validation images", "classes": "classes"}


@register("data", "folder")
class Folder:
    """Every image below a folder, scaled until it covers the image size, then cropped to it.

    What is held out for validation: what the lists say; else the last `validation_last` images by path; else what
    lies in a folder `val`, `valid`, `validation` or `test`, if there is a folder `train` beside it; else a share of the
    images that a hash of their paths picks, so that adding images moves none to the other side. The folders below
    the root (or below `train` and `val`) name the classes, if every image lies in one.

    An image that cannot be read is replaced by the next one of its part that can, and named once in the log.

    Args:
        root: The folder.
        train: A text file with the path of a training image per line, relative to the root, or a table `.csv` with a
            column `path` and, for labels, a column `label`. The name of the file alone will do if no other has it.
            Where only one part has a list, the other is every other image below the root.
        validation: The same for validation.
        validation_fraction: How much is held out by the hash; at least one image unless 0, every image if 1.
        validation_last: How many images, the last by path, are held out instead.
        labels: Whether folders, or tables, name classes.
        crop: Where training images are cropped; validation images are cropped at the centre. "resized" shows a part
            of random area and shape, stretched to the image size, as torchvision's RandomResizedCrop does.
        crop_area: The least and the largest share of an image that "resized" shows.
        crop_ratio: The least and the largest ratio of width to height of that part, 1 being the one of the image size.
        flip: Mirror every other training image.
        jitter: How far brightness, contrast and saturation of training images are changed, as a share, and the hue,
            as a share of its circle.
        resize: "antialias" is bicubic; "cv2" the bilinear without antialiasing that taming-transformers scales with.
        animated: Whether an animation counts as unreadable, or its first frame as an image.
        extensions: Endings of the files that count as images, in either case.
        max_pixels: The largest image that is decoded, width times height.
        max_unreadable: The share of unreadable images, one at least unless 0, above which the run stops.
        source_hint: What to say of the data, and where it is had, when the folder is missing.
        expected_counts: What there should be, `train` and `validation` images and `classes`; a warning says what
            differs.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str,
        train: str | None = None,
        validation: str | None = None,
        validation_fraction: float = 0.05,
        validation_last: int | None = None,
        labels: bool = True,
        crop: Crop = "random",
        crop_area: Sequence[float] = DEFAULT_CROP_AREA,
        crop_ratio: Sequence[float] = DEFAULT_CROP_RATIO,
        flip: bool = True,
        jitter: Sequence[float] = NO_JITTER,
        resize: Resize = "antialias",
        animated: Animated = "refuse",
        extensions: Sequence[str] = EXTENSIONS,
        max_pixels: int = MAX_PIXELS,
        max_unreadable: float = 0.01,
        source_hint: str | None = None,
        expected_counts: Mapping[str, int] | None = None,
    ) -> None:
        if not 0 <= validation_fraction <= 1:
            raise ValueError(f"validation_fraction={validation_fraction} is not in [0, 1]")
        if validation_last is not None and validation_last < 0:
            raise ValueError(f"validation_last={validation_last} is negative")
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"max_unreadable={max_unreadable} is not in [0, 1]")
        self.size, self.seed, self.root = pair(image_size), seed, Path(root).expanduser()
        self.augmentation = Augmentation(crop, crop_area, crop_ratio, flip, jitter, resize)
        self.animated, self.max_pixels, self.max_unreadable = animated, max_pixels, max_unreadable
        _check_folder(self.root, source_hint)
        with gc_paused():
            if train is None and validation is None:
                files = [file for file in _scan_images(self.root, extensions, source_hint) if self.is_image(file.name)]
                division = split_files(files, validation_fraction, validation_last)
            else:
                division = split_by_lists(self.root, train, validation, extensions)
            self.classes, self.class_numbers = class_numbers(division.labels if labels else ())
            self.partition = division.pack()
        self._check_expected_counts(expected_counts or {}, source_hint)

    @staticmethod
    def image_reader() -> MapDecoder:
        """Return what reads an image whole, in any folder: upright, its transparency on white."""
        return MapDecoder("rgb")

    def _check_expected_counts(self, expected: Mapping[str, int], hint: str | None) -> None:
        """Warn of numbers that are not those of the whole set."""
        found = {"train": len(self.partition.train), "validation": len(self.partition.validation)}
        found["classes"] = len(self.classes)
        if wrong := sorted(set(expected) - set(found)):
            raise ValueError(f"expected_counts.{wrong[0]}: only {', '.join(found)} can be expected")
        differ = [
            f"{found[key]:,} {COUNT_LABELS[key]} where {count:,} are expected"
            for key, count in expected.items()
            if found[key] != count
        ]
        if differ:
            name = f"{hint.partition(':')[0]} in " if hint else ""
            log.warning(f"data.root: {name}'{self.root}': {'; '.join(differ)}")

    def is_image(self, name: str) -> bool:
        """Say whether a file that was found is one of the images, by its path below the root."""
        return True

    def split(self, name: str) -> ImageSplit:
        """Return "train" or "validation"."""
        parts = {"train": self.partition.train, "validation": self.partition.validation}
        if name not in parts:
            raise UserError(unknown_message("split", name, parts))
        if not parts[name]:
            count = len(self.partition.train) + len(self.partition.validation)
            raise EmptySplitError(
                f"data.root: of the {count} images in '{self.root}' none is for {name}; "
                "see data.validation_fraction, data.validation_last and the lists data.train and data.validation"
            )
        files = parts[name]
        content = (tuple(file) for file in files)
        return ImageSplit(self, name, PackedStrings(file.name for file in files), self._labels(files), content)

    def _labels(self, files: Sequence[File]) -> torch.Tensor | None:
        if not self.classes:
            return None
        return torch.tensor([self.class_numbers[self.partition.label(file)] for file in files])


def _check_folder(root: Path, hint: str | None) -> None:
    if not root.is_dir():
        what = f"'{root}' is a file, not a folder" if root.exists() else f"no folder '{root}'"
        raise UserError(f"data.root: {what}{_source_hint(hint)}")


def _scan_images(root: Path, extensions: Sequence[str], hint: str | None) -> list[File]:
    files = scan(root, extensions)
    if not files:
        raise UserError(f"data.root: no images ({', '.join(extensions)}) in the folder '{root}'{_source_hint(hint)}")
    return files


def _source_hint(hint: str | None) -> str:
    where = f" ({hint}); point data.root to it, or to any" if hint else "; point data.root to a"
    return f"{where} folder of images"

"""A folder of images."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from vqf.batch import Size, pair
from vqf.data.files.dataset import ImageSplit
from vqf.data.files.listing import scan
from vqf.data.files.packed import File, PackedStrings, gc_paused
from vqf.data.files.train_validation import split_by_lists, split_files
from vqf.data.images.augment import (
    DEFAULT_CROP_AREA,
    DEFAULT_CROP_RATIO,
    NO_JITTER,
    Augmentation,
    Crop,
    CropArea,
    CropRatio,
    Jitter,
    Resize,
)
from vqf.data.images.decode import EXTENSIONS, MAX_PIXELS, Animated
from vqf.data.images.maps import MapDecoder
from vqf.data.images.pixel_values import PixelRange, check_range
from vqf.data.labels import NumericLabels, class_numbers, whole_number
from vqf.errors import EmptySplitError, UserError, unknown_message
from vqf.options.ranges import Fraction, NonNegativeInt, PositiveInt
from vqf.registry import register

log = logging.getLogger("vqf")

COUNT_LABELS = {"train": "training images", "validation": "validation images", "classes": "classes"}


@register("data", "folder")
class Folder:
    """Every image below a folder, scaled until it covers the image size, then cropped to it.

    Validation images are, in this order: those of the lists; the last `validation_last` by path; those in a folder
    `val`, `valid`, `validation` or `test` beside a folder `train`; a fraction picked by a hash of each path. The
    folders below the root (or below `train` and `val`) are the classes, if every image lies in one.

    Args:
        root: The folder.
        train: A text file with the path of a training image per line, or a table `.csv` with the column `path` and, for
            labels, `label`. Paths are relative to the folder of the images; a unique file name is enough. If only one
            split has a list, the other gets all other images.
        validation: The same for validation.
        validation_fraction: Fraction that the hash picks for validation: at least one image unless 0, all
            images if 1.
        validation_last: Number of images, the last by path, that are for validation instead.
        labels: Whether folders, or tables, give labels.
        numeric_labels: Whether labels that all are whole numbers are the class numbers ("index"), or names, which are
            numbered in order of their values ("name").
        crop: Where training images are cropped; validation images are center-cropped. "resized" crops a region of
            random area and aspect ratio and stretches it to the image size, like torchvision's RandomResizedCrop.
        crop_area: Smallest and largest area of a "resized" crop, as fractions of the image's area.
        crop_ratio: Smallest and largest aspect ratio (width / height) of a "resized" crop, relative to that of the
            image size.
        flip: Mirror each training image with probability 1/2.
        jitter: Strength of random changes of brightness, contrast, saturation and hue of training images, as in
            torchvision's ColorJitter.
        resize: "antialias" is bicubic; "cv2" is OpenCV's bilinear without antialiasing, as in taming-transformers.
        range: The values that become black and white in gray images of more than 8 bits, as in [0,4095] for 12 bits;
            values beyond are clipped. By default 0 and 65535. Images of 8 bits are not changed.
        animated: Whether an animation counts as unreadable, or its first frame is the image.
        extensions: File name extensions of images, in any case.
        max_pixels: Largest image that is decoded, width times height.
        max_unreadable: Fraction of unreadable images above which the run stops; one is allowed unless 0. The
            next readable image replaces an unreadable one.
        source_hint: Name and URL of the data set, for the error message when the folder is missing.
        expected_counts: Expected numbers of `train` and `validation` images and of `classes`; a difference is a
            warning.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str,
        train: str | None = None,
        validation: str | None = None,
        validation_fraction: Fraction = 0.05,
        validation_last: NonNegativeInt | None = None,
        labels: bool = True,
        numeric_labels: NumericLabels = "index",
        crop: Crop = "random",
        crop_area: CropArea = DEFAULT_CROP_AREA,
        crop_ratio: CropRatio = DEFAULT_CROP_RATIO,
        flip: bool = True,
        jitter: Jitter = NO_JITTER,
        resize: Resize = "antialias",
        range: PixelRange | None = None,
        animated: Animated = "refuse",
        extensions: Sequence[str] = EXTENSIONS,
        max_pixels: PositiveInt = MAX_PIXELS,
        max_unreadable: Fraction = 0.01,
        source_hint: str | None = None,
        expected_counts: Mapping[str, NonNegativeInt] | None = None,
    ) -> None:
        self.size, self.seed, self.root = pair(image_size), seed, Path(root).expanduser()
        self.augmentation = Augmentation(crop, crop_area, crop_ratio, flip, jitter, resize)
        self.pixel_range = check_range("range", range)
        self.animated, self.max_pixels, self.max_unreadable = animated, max_pixels, max_unreadable
        _check_folder(self.root, source_hint)
        with gc_paused():
            if train is None and validation is None:
                files = [file for file in _scan_images(self.root, extensions, source_hint) if self.is_image(file.name)]
                partition = split_files(files, validation_fraction, validation_last)
            else:
                partition = split_by_lists(self.root, train, validation, extensions)
            self.classes, self.class_numbers = class_numbers(
                partition.labels if labels else (), numeric_labels=numeric_labels
            )
            self.partition = partition.pack()
        self._check_expected_counts(expected_counts or {}, source_hint)

    @staticmethod
    def image_reader(range: Sequence[float] | None = None) -> MapDecoder:
        """Return a reader of full images: upright, transparency on white."""
        return MapDecoder("rgb", pixel_range=check_range("range", range), range_option="data.range")

    def is_image(self, name: str) -> bool:
        return True

    def split(self, name: str) -> ImageSplit:
        """Return a split.

        Raises:
            EmptySplitError: If it has no images.
        """
        files = self._files(name)
        names = PackedStrings(file.name for file in files)
        return ImageSplit(self, name, names, self._labels(files), self._content(files))

    def _files(self, name: str) -> Sequence[File]:
        splits = {"train": self.partition.train, "validation": self.partition.validation}
        if name not in splits:
            raise UserError(unknown_message("split", name, splits))
        if not splits[name]:
            count = len(self.partition.train) + len(self.partition.validation)
            raise EmptySplitError(
                f"data.root: no {name} images among the {count} in '{self.root}'; see data.validation_fraction, "
                "data.validation_last and the lists data.train and data.validation"
            )
        return splits[name]

    def _labels(self, files: Sequence[File]) -> torch.Tensor | None:
        if not self.classes:
            return None
        return torch.tensor([self.class_numbers[self.partition.label(file)] for file in files])

    def _content(self, files: Sequence[File]) -> Iterator[tuple[object, ...]]:
        """Yield the fields of each file, with the class number in place of a label that is a whole number."""
        labels = [label for label in self.class_numbers if label is not None and whole_number(label) is not None]
        numbers: dict[int | str | None, int] = {label: self.class_numbers[label] for label in labels}
        for file in files:
            label = self.partition.label(file) if numbers else None
            yield tuple(file._replace(label=numbers.get(label, file.label)))

    def _check_expected_counts(self, expected: Mapping[str, int], hint: str | None) -> None:
        counts = {
            "train": len(self.partition.train),
            "validation": len(self.partition.validation),
            "classes": len(self.classes),
        }
        if unknown := sorted(set(expected) - set(counts)):
            raise ValueError(f"expected_counts.{unknown[0]}: only {', '.join(counts)} can be expected")
        differences = [
            f"{counts[key]:,} {COUNT_LABELS[key]} where {count:,} are expected"
            for key, count in expected.items()
            if counts[key] != count
        ]
        if differences:
            data_set = f"{hint.partition(':')[0]} in " if hint else ""
            log.warning(f"data.root: {data_set}'{self.root}': {'; '.join(differences)}")


def _check_folder(root: Path, hint: str | None) -> None:
    if not root.is_dir():
        problem = f"'{root}' is a file, not a folder" if root.exists() else f"no folder '{root}'"
        raise UserError(f"data.root: {problem}{_cure(hint)}")


def _scan_images(root: Path, extensions: Sequence[str], hint: str | None) -> list[File]:
    listing = scan(root, extensions)
    if not listing.files:
        others = f", only {listing.describe_left_out()}" if listing.left_out else ""
        raise UserError(f"data.root: no images ({', '.join(extensions)}) in the folder '{root}'{others}{_cure(hint)}")
    listing.log_left_out(root, "data.root", "data.extensions says which endings are images")
    return listing.files


def _cure(hint: str | None) -> str:
    if hint is None:
        return "; point data.root to a folder of images"
    return f" ({hint}); point data.root to it, or to any folder of images"

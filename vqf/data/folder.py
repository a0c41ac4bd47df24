"""A folder of pictures: any number of subfolders, any size, any mode."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vqf.batch import Size, pair
from vqf.data.files.dataset import PictureSplit
from vqf.data.files.listing import divide, divide_by_lists, scan
from vqf.data.files.packed import File, Names, without_collector
from vqf.data.images.augment import AREA, RATIO, UNCHANGED, Crop, Resize, Views
from vqf.data.images.decode import EXTENSIONS, MAX_PIXELS, Animated
from vqf.data.images.maps import Reading
from vqf.data.labels import numbered
from vqf.errors import EmptyPartError, UserError, unknown
from vqf.registry import register

log = logging.getLogger("vqf")

WORDS = {"train": "training pictures", "validation": "validation pictures", "classes": "classes"}


@register("data", "folder")
class Folder:
    """Every picture below a folder, scaled until it covers the image size, then cropped to it.

    What is held out for validation: what the lists say; else the last `validation_last` pictures by path; else what
    lies in a folder `val`, `valid`, `validation` or `test`, if there is a folder `train` beside it; else a share of the
    pictures that a hash of their paths picks, so that adding pictures moves none to the other side. The folders below
    the root (or below `train` and `val`) name the classes, if every picture lies in one.

    A picture that cannot be read is replaced by the next one of its part that can, and named once in the log.

    Args:
        root: The folder.
        train: A text file with the path of a training picture per line, relative to the root, or a table `.csv` with a
            column `path` and, for labels, a column `label`. The name of the file alone will do if no other has it.
            Where only one part has a list, the other is every other picture below the root.
        validation: The same for validation.
        validation_share: How much is held out by the hash; at least one picture unless 0, every picture if 1.
        validation_last: How many pictures, the last by path, are held out instead.
        labels: Whether folders, or tables, name classes.
        crop: Where training pictures are cropped; validation pictures are cropped at the centre. "resized" shows a part
            of random area and shape, stretched to the image size, as torchvision's RandomResizedCrop does.
        crop_area: The least and the largest share of a picture that "resized" shows.
        crop_ratio: The least and the largest ratio of width to height of that part, 1 being the one of the image size.
        flip: Mirror every other training picture.
        jitter: How far brightness, contrast and saturation of training pictures are changed, as a share, and the hue,
            as a share of its circle.
        resize: "antialias" is bicubic; "cv2" the bilinear without antialiasing that taming-transformers scales with.
        animated: Whether an animation counts as unreadable, or its first frame as a picture.
        extensions: Endings of the files that count as pictures, in either case.
        max_pixels: The largest picture that is decoded, width times height.
        max_bad: The share of unreadable pictures, one at least unless 0, above which the run stops.
        hint: What to say of the data, and where it is had, when the folder is missing.
        expected: What there should be, `train` and `validation` pictures and `classes`; a warning says what differs.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str,
        train: str | None = None,
        validation: str | None = None,
        validation_share: float = 0.05,
        validation_last: int | None = None,
        labels: bool = True,
        crop: Crop = "random",
        crop_area: Sequence[float] = AREA,
        crop_ratio: Sequence[float] = RATIO,
        flip: bool = True,
        jitter: Sequence[float] = UNCHANGED,
        resize: Resize = "antialias",
        animated: Animated = "refuse",
        extensions: Sequence[str] = EXTENSIONS,
        max_pixels: int = MAX_PIXELS,
        max_bad: float = 0.01,
        hint: str | None = None,
        expected: Mapping[str, int] | None = None,
    ) -> None:
        if not 0 <= validation_share <= 1:
            raise ValueError(f"validation_share={validation_share} is not in [0, 1]")
        if validation_last is not None and validation_last < 0:
            raise ValueError(f"validation_last={validation_last} is negative")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad={max_bad} is not in [0, 1]")
        self.size, self.seed, self.root = pair(image_size), seed, Path(root).expanduser()
        self.views = Views(crop, crop_area, crop_ratio, flip, jitter, resize)
        self.animated, self.max_pixels, self.max_bad = animated, max_pixels, max_bad
        _check_folder(self.root, hint)
        with without_collector():
            if train is None and validation is None:
                files = [file for file in _found(self.root, extensions, hint) if self.shows(file.name)]
                division = divide(files, validation_share, validation_last)
            else:
                division = divide_by_lists(self.root, train, validation, extensions)
            self.classes, self.numbers = numbered(division.labels if labels else ())
            self.division = division.packed()
        self._compare(expected or {}, hint)

    @staticmethod
    def picture_reader() -> Reading:
        """Return what reads a picture whole, in any folder: upright, its transparency on white."""
        return Reading("rgb")

    def _compare(self, expected: Mapping[str, int], hint: str | None) -> None:
        """Warn of numbers that are not those of the whole set."""
        found = {"train": len(self.division.train), "validation": len(self.division.validation)}
        found["classes"] = len(self.classes)
        if wrong := sorted(set(expected) - set(found)):
            raise ValueError(f"expected.{wrong[0]}: only {', '.join(found)} can be expected")
        differ = [
            f"{found[key]:,} {WORDS[key]} where {count:,} are expected"
            for key, count in expected.items()
            if found[key] != count
        ]
        if differ:
            name = f"{hint.partition(':')[0]} in " if hint else ""
            log.warning(f"data.root: {name}'{self.root}': {'; '.join(differ)}")

    def shows(self, name: str) -> bool:
        """Say whether a file that was found is one of the pictures, by its path below the root."""
        return True

    def split(self, name: str) -> PictureSplit:
        """Return "train" or "validation"."""
        parts = {"train": self.division.train, "validation": self.division.validation}
        if name not in parts:
            raise UserError(unknown("split", name, parts))
        if not parts[name]:
            count = len(self.division.train) + len(self.division.validation)
            raise EmptyPartError(
                f"data.root: of the {count} pictures in '{self.root}' none is for {name}; "
                "see data.validation_share, data.validation_last and the lists data.train and data.validation"
            )
        files = parts[name]
        content = (tuple(file) for file in files)
        return PictureSplit(self, name, Names(file.name for file in files), self._labels(files), content)

    def _labels(self, files: Sequence[File]) -> torch.Tensor | None:
        if not self.classes:
            return None
        return torch.tensor([self.numbers[self.division.label(file)] for file in files])


def _check_folder(root: Path, hint: str | None) -> None:
    if not root.is_dir():
        what = f"'{root}' is a file, not a folder" if root.exists() else f"no folder '{root}'"
        raise UserError(f"data.root: {what}{_advice(hint)}")


def _found(root: Path, extensions: Sequence[str], hint: str | None) -> list[File]:
    files = scan(root, extensions)
    if not files:
        raise UserError(f"data.root: no pictures ({', '.join(extensions)}) in the folder '{root}'{_advice(hint)}")
    return files


def _advice(hint: str | None) -> str:
    where = f" ({hint}); point data.root to it, or to any" if hint else "; point data.root to a"
    return f"{where} folder of images"

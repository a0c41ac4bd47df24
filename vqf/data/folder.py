"""A folder of pictures: any number of subfolders, any size, any mode."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from vqf.data.imaging import MAX_PIXELS
from vqf.data.listing import File, Names, class_of, divide, divide_by_lists, scan
from vqf.data.split import PictureSplit
from vqf.errors import UserError, unknown
from vqf.protocols import Size, pair
from vqf.registry import register

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


@register("data", "folder")
class Folder:
    """Every picture below a folder, scaled until it covers the image size, then cropped to it.

    What is held out for validation: what the lists say; else the last `validation_last` pictures by path; else what
    lies in a folder `val` or `validation`, if there is a folder `train` beside it; else a share of the pictures that
    a hash of their paths picks, so that adding pictures moves none to the other side. The folders below the root (or
    below `train` and `val`) name the classes, if every picture lies in one.

    A picture that cannot be read is replaced by the next one of its part that can, and named once in the log.

    Args:
        root: The folder.
        train: A text file with the path of a training picture per line, relative to the root. Where only one part
            has a list, the other is every other picture below the root.
        validation: The same for validation.
        validation_share: How much is held out by the hash; at least one picture unless 0, every picture if 1.
        validation_last: How many pictures, the last by path, are held out instead.
        labels: Whether folders name classes.
        crop: Where training pictures are cropped; validation pictures are cropped at the centre.
        flip: Mirror every other training picture.
        extensions: Endings of the files that count as pictures, in either case.
        max_pixels: The largest picture that is decoded, width times height.
        max_bad: The share of unreadable pictures, one at least unless 0, above which the run stops.
        hint: What to say of the data, and where it is had, when the folder is missing.
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
        crop: Literal["center", "random"] = "random",
        flip: bool = True,
        extensions: Sequence[str] = EXTENSIONS,
        max_pixels: int = MAX_PIXELS,
        max_bad: float = 0.01,
        hint: str | None = None,
    ) -> None:
        if not 0 <= validation_share <= 1:
            raise ValueError(f"validation_share={validation_share} is not in [0, 1]")
        if validation_last is not None and validation_last < 0:
            raise ValueError(f"validation_last={validation_last} is negative")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad={max_bad} is not in [0, 1]")
        self.size, self.seed, self.root = pair(image_size), seed, Path(root).expanduser()
        self.crop, self.flip = crop, flip
        self.max_pixels, self.max_bad = max_pixels, max_bad
        _check_folder(self.root, hint)
        if train is None and validation is None:
            files = _found(self.root, extensions, hint)
            self.division = divide(files, validation_share, validation_last)
        else:
            self.division = divide_by_lists(self.root, train, validation, extensions)
        self.classes = self.division.classes if labels else []

    def split(self, name: str) -> PictureSplit:
        """Return "train" or "validation"."""
        parts = {"train": self.division.train, "validation": self.division.validation}
        if name not in parts:
            raise UserError(unknown("split", name, parts))
        if not parts[name]:
            count = len(self.division.train) + len(self.division.validation)
            raise UserError(
                f"data.root: of the {count} pictures in '{self.root}' none is for {name}; "
                "see data.validation_share, data.validation_last and the lists data.train and data.validation"
            )
        files = parts[name]
        labels = _labels(files, self.classes, self.division.depth)
        content = (tuple(file) for file in files)
        return PictureSplit(self, name, Names(file.name for file in files), labels, content)


def _labels(files: list[File], classes: list[str], depth: int) -> torch.Tensor | None:
    if not classes:
        return None
    numbers = {name: i for i, name in enumerate(classes)}
    return torch.tensor([numbers[class_of(file.name, depth) or ""] for file in files])


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

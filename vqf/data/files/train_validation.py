"""Split images into training and validation."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vqf.data.files.image_list import read_list
from vqf.data.files.listing import scan
from vqf.data.files.packed import File, PackedFiles
from vqf.seeding import hash_fraction

log = logging.getLogger("vqf")

TRAIN_FOLDERS = ("train", "training")  # in any case, like the next line
VALIDATION_FOLDERS = ("val", "valid", "validation", "test", "testing")  # the first that exists is used


@dataclass(frozen=True)
class TrainValidationSplit:
    """The files of both splits, and the origin of their labels."""

    train: Sequence[File]
    validation: Sequence[File]
    class_depth: int | None = 0  # depth of the class folders below the root; None: labels come from a table

    def pack(self) -> "TrainValidationSplit":
        return replace(self, train=PackedFiles(self.train), validation=PackedFiles(self.validation))

    def label(self, file: File) -> int | str | None:
        """Return the label of the table, or the class folder, or None."""
        if self.class_depth is None:
            return file.label
        folders = file.name.split("/")[:-1]
        return folders[self.class_depth] if len(folders) > self.class_depth and not os.path.isabs(file.name) else None

    @property
    def labels(self) -> set[int | str]:
        """All labels; empty unless every image has one and two differ."""
        labels: set[int | str] = set()
        unlabelled = None
        for file in (*self.train, *self.validation):
            if (label := self.label(file)) is not None:
                labels.add(label)
            else:
                unlabelled = unlabelled or file.name
        if labels and unlabelled:
            reason = (
                "lies in no class folder, as other images do" if self.class_depth is not None else "has none in a table"
            )
            log.warning(f"data.root: no labels, because '{unlabelled}' {reason}")
            return set()
        if len(labels) == 1:
            log.info(f"data.root: no labels, because all images have the same one, '{next(iter(labels))}'")
            return set()
        return labels


def split_by_lists(
    root: Path, train: str | None, validation: str | None, extensions: Sequence[str]
) -> TrainValidationSplit:
    """Read the splits from lists; one without a list gets all other images."""
    splits = [
        None if path is None else read_list(path, root, f"data.{option}", extensions)
        for option, path in (("train", train), ("validation", validation))
    ]
    if None in splits:
        listed = {file.name for files in splits for file in files or ()}
        listing = scan(root, extensions)
        listing.log_left_out(root, "data.root", "data.extensions says which endings are images")
        others = [file for file in listing.files if file.name not in listed]
        splits = [others if files is None else files for files in splits]
    train_files, validation_files = (files or [] for files in splits)
    if both := {file.name for file in train_files} & {file.name for file in validation_files}:
        log.warning(f"data.validation: {len(both)} of its images are trained on too, such as '{min(both)}'")
    return TrainValidationSplit(train_files, validation_files, _class_depth([*train_files, *validation_files]))


def split_files(files: list[File], validation_fraction: float, last: int | None) -> TrainValidationSplit:
    """Split images: the `last` by path, else by folders named train and val, else by a hash of each path."""
    if last is not None:
        first = max(len(files) - last, 0)
        return TrainValidationSplit(files[:first], files[first:])
    if validation_fraction == 1:
        return TrainValidationSplit([], files)
    top_folders = {file.name.split("/")[0] for file in files if "/" in file.name}
    train, validation = (_first_match(top_folders, names) for names in (TRAIN_FOLDERS, VALIDATION_FOLDERS))
    if train and validation:
        return _split_by_folders(files, train, validation)
    if train and all(file.name.startswith(f"{train}/") for file in files):
        log.info(f"data.root: all images are in '{train}'; a fraction of them is held out for validation")
        return replace(_split_by_hash(files, validation_fraction), class_depth=1)
    if folder := train or validation:
        log.warning(
            f"data.root: '{folder}' counts as a class folder, because there is no folder "
            f"{' or '.join(VALIDATION_FOLDERS if train else TRAIN_FOLDERS)} beside it"
        )
    return _split_by_hash(files, validation_fraction)


def _first_match(folders: Iterable[str], names: Sequence[str]) -> str | None:
    by_lowercase = {folder.lower(): folder for folder in sorted(folders)}
    return next((by_lowercase[name] for name in names if name in by_lowercase), None)


def _split_by_folders(files: list[File], train_folder: str, validation_folder: str) -> TrainValidationSplit:
    train, validation = (
        [file for file in files if file.name.startswith(f"{folder}/")] for folder in (train_folder, validation_folder)
    )
    count = len(files) - len(train) - len(validation)
    cure = "the lists data.train and data.validation can name them"
    skipped = f"; {count} images beside them are left out ({cure})" if count else ""
    log.info(f"data.root: '{train_folder}' is for training, '{validation_folder}' for validation{skipped}")
    return TrainValidationSplit(train, validation, class_depth=1)


def _class_depth(files: Sequence[File]) -> int | None:
    """Return 1 if folders like train and val hold all images, else 0."""
    if any(file.label is not None for file in files):
        return None
    top = {file.name.split("/")[0].lower() for file in files}
    return int(bool(top) and top <= {*TRAIN_FOLDERS, *VALIDATION_FOLDERS})


def _split_by_hash(files: list[File], fraction: float) -> TrainValidationSplit:
    hashes = [hash_fraction(file.name) for file in files]
    if len(files) > 1 and fraction > 0:  # a small folder keeps at least one image in each split
        ranked = sorted(hashes)
        fraction = min(max(fraction, ranked[1]), ranked[-1])
    splits: tuple[list[File], list[File]] = ([], [])
    for file, value in zip(files, hashes, strict=True):
        splits[value < fraction].append(file)
    return TrainValidationSplit(*splits)

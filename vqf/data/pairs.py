"""Pictures with a map each: two folders, or one, in which names say which map belongs to which picture."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from vqf.batch import Size
from vqf.data.files.dataset import tolerated
from vqf.data.files.listing import scan
from vqf.data.files.packed import File, Names
from vqf.data.files.pair_dataset import MappedSplit
from vqf.data.folder import Folder
from vqf.data.images.augment import AREA, RATIO, UNCHANGED, Crop, Resize
from vqf.data.images.decode import EXTENSIONS, MAX_PIXELS, Animated
from vqf.data.images.maps import Kind, Reading
from vqf.errors import UserError
from vqf.registry import register

log = logging.getLogger("vqf")


@register("data", "pairs")
class Pairs(Folder):
    """Pictures of a folder, each with a map of the same place: `Sample.condition` (C, H, W).

    The map of `images/a/b.jpg` is `conditions/a/b.png`, whatever its ending. A map has the shape of its picture, at any
    scale; it is cut where its picture is cut, and mirrored with it. What is held out is decided by the pictures, as in
    `data=folder`. A picture without a map, or with one that cannot be read, counts as a picture that cannot be read.

    Args:
        root: The folder of both.
        images: The folder of the pictures, below the root or absolute.
        conditions: The folder of the maps; it may be that of the pictures.
        suffix: What the name of a map has between that of its picture and the ending: `_depth` in `a_depth.png`.
        maps: What a map is. `rgb` and `grey`: a picture of 3 channels or 1, scaled as pictures are. `palette`: a
            picture of 3 channels whose colours mean something, so that none are mixed. `labels`: every pixel is the
            number of a class; `labels` channels, 1 where a pixel is of the class and 0 elsewhere.
        labels: The number of classes.
        unlabelled: The number that stands for no class. It becomes class 0, and every other moves up by one.
        train: As in `data=folder`, with paths below the folder of the pictures.
        validation: The same for validation.
        validation_share: As in `data=folder`.
        validation_last: As in `data=folder`.
        crop: As in `data=folder`.
        crop_area: As in `data=folder`.
        crop_ratio: As in `data=folder`.
        flip: Mirror every other training pair.
        jitter: As in `data=folder`; maps keep their colours.
        resize: As in `data=folder`; `rgb` and `grey` maps are always antialiased.
        animated: As in `data=folder`.
        extensions: Endings of the files that count as pictures.
        max_pixels: The largest picture or map that is decoded, width times height.
        max_bad: The share of unreadable pairs, one at least unless 0, above which the run stops.
        hint: What to say of the data, and where it is had, when a folder is missing.
        expected: As in `data=folder`.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str,
        images: str = "images",
        conditions: str = "conditions",
        suffix: str = "",
        maps: Kind = "rgb",
        labels: int = 0,
        unlabelled: int | None = None,
        train: str | None = None,
        validation: str | None = None,
        validation_share: float = 0.05,
        validation_last: int | None = None,
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
        base = Path(root).expanduser()
        self.reading = self.condition_reader(maps, labels, unlabelled)
        self.suffix, self.maps = suffix, base / conditions
        self.together = self.maps.resolve() == (base / images).resolve()
        if self.together and not suffix:
            raise ValueError(f"images and conditions are both '{images}'; give data.suffix, which tells them apart")
        super().__init__(
            image_size,
            seed,
            root=str(base / images),
            train=train,
            validation=validation,
            validation_share=validation_share,
            validation_last=validation_last,
            labels=False,
            crop=crop,
            crop_area=crop_area,
            crop_ratio=crop_ratio,
            flip=flip,
            jitter=jitter,
            resize=resize,
            animated=animated,
            extensions=extensions,
            max_pixels=max_pixels,
            max_bad=max_bad,
            hint=hint,
            expected=expected,
        )
        self.partners = _partners(self.maps, suffix, hint)

    @staticmethod
    def condition_reader(maps: Kind = "rgb", labels: int = 0, unlabelled: int | None = None) -> Reading:
        """Return what reads a map that lies in no folder of pairs; see `vqf.protocols.Data`."""
        return Reading(maps, labels, unlabelled)

    def shows(self, name: str) -> bool:
        """Say whether a file is a picture, and no map in the same folder."""
        return not self.together or not _stem(name).endswith(self.suffix)

    def split(self, name: str) -> "PairSplit":
        """Return "train" or "validation".

        Raises:
            UserError: If it is empty, or too many of its pictures have no map.
        """
        super().split(name)  # refuses what is no part, and an empty one
        files = [file for file in getattr(self.division, name) if self.shows(file.name)]
        maps = [self.partners.get(_stem(file.name)) for file in files]
        self._check_missing([file.name for file, found in zip(files, maps, strict=True) if not found], len(files))
        return PairSplit(self, name, files, maps)

    def _check_missing(self, names: Sequence[str], count: int) -> None:
        if not names:
            return
        what = f"{len(names)} of the {count} pictures in '{self.root}' have no map in '{self.maps}'"
        where = f"'{_stem(names[0])}{self.suffix}' with any ending for '{names[0]}'"
        if len(names) > tolerated(self.max_bad, count) or len(names) == count:
            raise UserError(f"data.conditions: {what}; looked for {where}")
        log.warning(f"data.conditions: {what}; other pairs take their places. Looked for {where}")


class PairSplit(MappedSplit):
    """The pairs of two folders."""

    def __init__(self, data: Pairs, part: str, files: Sequence[File], maps: Sequence[File | None]) -> None:
        self.maps = Names(each.name if each else "" for each in maps)
        self.folder, self.reading = data.maps, data.reading
        content = [astuple(data.reading), *map(tuple, files), *(each and tuple(each) for each in maps)]
        super().__init__(data, part, Names(file.name for file in files), None, content)

    def open_map(self, index: int) -> Path:
        """Return the file of a map."""
        return self.folder / self.maps[index]


def _partners(folder: Path, suffix: str, hint: str | None) -> dict[str, File]:
    """List the maps of a folder by the path of the picture that each belongs to, without its ending."""
    if not folder.is_dir():
        raise UserError(f"data.conditions: no folder '{folder}'{f' ({hint})' if hint else ''}; it holds the maps")
    found: dict[str, File] = {}
    for file in _maps(scan(folder, EXTENSIONS), suffix):
        stem = _stem(file.name).removesuffix(suffix)
        if stem in found:
            raise UserError(f"data.conditions: '{found[stem].name}' and '{file.name}' are maps of the same picture")
        found[stem] = file
    return found


def _maps(files: Iterable[File], suffix: str) -> list[File]:
    return [file for file in files if _stem(file.name).endswith(suffix)]


def _stem(name: str) -> str:
    """Return a path without the ending of its file, whose name alone may have one."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0]

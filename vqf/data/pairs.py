"""Images with a map each: two folders, or one, in which names say which map belongs to which image."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from vqf.batch import Size
from vqf.data.files.dataset import allowed_unreadable
from vqf.data.files.listing import scan
from vqf.data.files.packed import File, PackedStrings
from vqf.data.files.pair_dataset import PairedImageSplit
from vqf.data.folder import Folder
from vqf.data.images.augment import DEFAULT_CROP_AREA, DEFAULT_CROP_RATIO, NO_JITTER, Crop, Resize
from vqf.data.images.decode import EXTENSIONS, MAX_PIXELS, Animated
from vqf.data.images.maps import MapDecoder, MapKind
from vqf.errors import UserError
from vqf.registry import register

log = logging.getLogger("vqf")


@register("data", "pairs")
class Pairs(Folder):
    """Images of a folder, each with a map of the same place: `Sample.condition` (C, H, W).

    The map of `images/a/b.jpg` is `conditions/a/b.png`, whatever its ending. A map has the shape of its image, at any
    scale; it is cut where its image is cut, and mirrored with it. What is held out is decided by the images, as in
    `data=folder`. An image without a map, or with one that cannot be read, counts as an image that cannot be read.

    Args:
        root: The folder of both.
        images: The folder of the images, below the root or absolute.
        conditions: The folder of the maps; it may be that of the images.
        suffix: What the name of a map has between that of its image and the ending: `_depth` in `a_depth.png`.
        maps: What a map is. `rgb` and `grey`: an image of 3 channels or 1, scaled as images are. `palette`: an
            image of 3 channels whose colours mean something, so that none are mixed. `labels`: every pixel is the
            number of a class; `labels` channels, 1 where a pixel is of the class and 0 elsewhere.
        labels: The number of classes.
        unlabelled: The number that stands for no class. It becomes class 0, and every other moves up by one.
        train: As in `data=folder`, with paths below the folder of the images.
        validation: The same for validation.
        validation_fraction: As in `data=folder`.
        validation_last: As in `data=folder`.
        crop: As in `data=folder`.
        crop_area: As in `data=folder`.
        crop_ratio: As in `data=folder`.
        flip: Mirror every other training pair.
        jitter: As in `data=folder`; maps keep their colours.
        resize: As in `data=folder`; `rgb` and `grey` maps are always antialiased.
        animated: As in `data=folder`.
        extensions: Endings of the files that count as images.
        max_pixels: The largest image or map that is decoded, width times height.
        max_unreadable: The share of unreadable pairs, one at least unless 0, above which the run stops.
        source_hint: What to say of the data, and where it is had, when a folder is missing.
        expected_counts: As in `data=folder`.
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
        maps: MapKind = "rgb",
        labels: int = 0,
        unlabelled: int | None = None,
        train: str | None = None,
        validation: str | None = None,
        validation_fraction: float = 0.05,
        validation_last: int | None = None,
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
        base = Path(root).expanduser()
        self.map_decoder = self.condition_reader(maps, labels, unlabelled)
        self.suffix, self.maps_folder = suffix, base / conditions
        self.same_folder = self.maps_folder.resolve() == (base / images).resolve()
        if self.same_folder and not suffix:
            raise ValueError(f"images and conditions are both '{images}'; give data.suffix, which tells them apart")
        super().__init__(
            image_size,
            seed,
            root=str(base / images),
            train=train,
            validation=validation,
            validation_fraction=validation_fraction,
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
            max_unreadable=max_unreadable,
            source_hint=source_hint,
            expected_counts=expected_counts,
        )
        self.maps_by_stem = _maps_by_stem(self.maps_folder, suffix, source_hint)

    @staticmethod
    def condition_reader(maps: MapKind = "rgb", labels: int = 0, unlabelled: int | None = None) -> MapDecoder:
        """Return what reads a map that lies in no folder of pairs; see `vqf.protocols.Data`."""
        return MapDecoder(maps, labels, unlabelled)

    def is_image(self, name: str) -> bool:
        """Say whether a file is an image, and no map in the same folder."""
        return not self.same_folder or not _stem(name).endswith(self.suffix)

    def split(self, name: str) -> "PairSplit":
        """Return "train" or "validation".

        Raises:
            UserError: If it is empty, or too many of its images have no map.
        """
        super().split(name)  # refuses what is no part, and an empty one
        files = [file for file in getattr(self.partition, name) if self.is_image(file.name)]
        maps = [self.maps_by_stem.get(_stem(file.name)) for file in files]
        self._check_missing([file.name for file, found in zip(files, maps, strict=True) if not found], len(files))
        return PairSplit(self, name, files, maps)

    def _check_missing(self, names: Sequence[str], count: int) -> None:
        if not names:
            return
        what = f"{len(names)} of the {count} images in '{self.root}' have no map in '{self.maps_folder}'"
        where = f"'{_stem(names[0])}{self.suffix}' with any ending for '{names[0]}'"
        if len(names) > allowed_unreadable(self.max_unreadable, count) or len(names) == count:
            raise UserError(f"data.conditions: {what}; looked for {where}")
        log.warning(f"data.conditions: {what}; other pairs take their places. Looked for {where}")


class PairSplit(PairedImageSplit):
    """The pairs of two folders."""

    def __init__(self, data: Pairs, split_name: str, files: Sequence[File], maps: Sequence[File | None]) -> None:
        self.map_names = PackedStrings(each.name if each else "" for each in maps)
        self.maps_folder, self.map_decoder = data.maps_folder, data.map_decoder
        content = [astuple(data.map_decoder), *map(tuple, files), *(each and tuple(each) for each in maps)]
        super().__init__(data, split_name, PackedStrings(file.name for file in files), None, content)

    def open_map(self, index: int) -> Path:
        """Return the file of a map."""
        return self.maps_folder / self.map_names[index]


def _maps_by_stem(folder: Path, suffix: str, hint: str | None) -> dict[str, File]:
    """List the maps of a folder by the path of the image that each belongs to, without its ending."""
    if not folder.is_dir():
        raise UserError(f"data.conditions: no folder '{folder}'{f' ({hint})' if hint else ''}; it holds the maps")
    found: dict[str, File] = {}
    for file in _with_suffix(scan(folder, EXTENSIONS), suffix):
        stem = _stem(file.name).removesuffix(suffix)
        if stem in found:
            raise UserError(f"data.conditions: '{found[stem].name}' and '{file.name}' are maps of the same image")
        found[stem] = file
    return found


def _with_suffix(files: Iterable[File], suffix: str) -> list[File]:
    return [file for file in files if _stem(file.name).endswith(suffix)]


def _stem(name: str) -> str:
    """Return a path without the ending of its file, whose name alone may have one."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0]

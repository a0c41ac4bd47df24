"""Images with condition maps in a folder."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vqf.batch import Size
from vqf.data.files.listing import scan
from vqf.data.files.packed import File, PackedStrings
from vqf.data.files.pair_dataset import PairedImageSplit
from vqf.data.files.read_errors import allowed_unreadable
from vqf.data.folder import Folder
from vqf.data.images.decode import EXTENSIONS
from vqf.data.images.maps import MapDecoder, MapKind
from vqf.data.images.pixel_values import PixelRange, check_range
from vqf.errors import UserError
from vqf.options.ranges import AnyLabel, NonNegativeInt
from vqf.registry import register

log = logging.getLogger("vqf")


@register("data", "pairs")
class Pairs(Folder):
    """Images of a folder, each with an aligned condition map: `Sample.condition` (C, H, W).

    The map of `images/a/b.jpg` is `conditions/a/b.png`, with any extension. It has the aspect ratio of its image, at
    any scale, and is cropped and flipped with it; jitter and resize=cv2 change the image alone. An image without a
    readable map is unreadable. Images are split as in `data=folder`.

    Args:
        root: The folder of both.
        images: The folder of the images, relative to the root or absolute.
        conditions: The folder of the maps; may be that of the images.
        suffix: What the name of a map has between the image's name and the extension: `_depth` in `a_depth.png`.
        maps: What a map holds. `rgb` and `grey`: an image of 3 channels or 1, resized like images, always antialiased.
            `palette`: an image of 3 channels whose colors are codes, resized without mixing them. `labels`: a class
            number per pixel, one-hot encoded into `labels` channels.
        labels: Number of classes of maps=labels, at least 2.
        unlabelled: The number of pixels without a class. It becomes class 0, and every other number moves up by one.
        map_range: The values that become black and white in gray maps of more than 8 bits, as `range` for images.
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
        labels: NonNegativeInt = 0,
        unlabelled: AnyLabel | None = None,
        map_range: PixelRange | None = None,
        source_hint: str | None = None,
        **options: Any,
    ) -> None:
        base = Path(root).expanduser()
        self.map_decoder = self.condition_reader(maps, labels, unlabelled, map_range)
        self.suffix, self.maps_folder = suffix, base / conditions
        self.same_folder = self.maps_folder.resolve() == (base / images).resolve()
        if self.same_folder and not suffix:
            raise ValueError(f"images and conditions are both '{images}'; give data.suffix, which tells them apart")
        super().__init__(image_size, seed, root=str(base / images), labels=False, source_hint=source_hint, **options)
        self.maps_by_stem = _maps_by_stem(self._list_maps(source_hint), suffix)
        self._log_unused_maps()

    @staticmethod
    def condition_reader(
        maps: MapKind = "rgb",
        labels: int = 0,
        unlabelled: int | None = None,
        map_range: PixelRange | None = None,
    ) -> MapDecoder:
        return MapDecoder(maps, labels, unlabelled, check_range("map_range", map_range))

    def is_image(self, name: str) -> bool:
        return not self.same_folder or not _stem(name).endswith(self.suffix)

    def split(self, name: str) -> "PairSplit":
        """Return a split.

        Raises:
            UserError: If it is empty, or too many maps are missing.
        """
        files = [file for file in self._files(name) if self.is_image(file.name)]
        maps = [self.maps_by_stem.get(_stem(file.name)) for file in files]
        unpaired = [file.name for file, map_file in zip(files, maps, strict=True) if map_file is None]
        self._check_missing(unpaired, len(files))
        return PairSplit(self, name, files, maps)

    def _list_maps(self, hint: str | None) -> list[File]:
        if not self.maps_folder.is_dir():
            cure = f" ({hint})" if hint else ""
            raise UserError(f"data.conditions: no folder '{self.maps_folder}'{cure}; it holds the maps")
        listing = scan(self.maps_folder, EXTENSIONS)
        maps = [file for file in listing.files if _stem(file.name).endswith(self.suffix)]
        if not self.same_folder:
            listing.log_left_out(self.maps_folder, "data.conditions", "maps have the ending of an image")
            if others := sorted({*listing.files} - {*maps}):
                log.info(
                    f"data.suffix={self.suffix}: {len(others)} images in '{self.maps_folder}' are no maps, because "
                    f"their names do not end with it, such as '{others[0].name}'"
                )
        return maps

    def _log_unused_maps(self) -> None:
        stems = {_stem(file.name) for files in (self.partition.train, self.partition.validation) for file in files}
        if unused := [file.name for stem, file in self.maps_by_stem.items() if stem not in stems]:
            count = len(self.maps_by_stem)
            log.info(
                f"data.conditions: {len(unused)} of the {count} maps in '{self.maps_folder}' belong to no image, such "
                f"as '{unused[0]}'"
            )

    def _check_missing(self, names: Sequence[str], count: int) -> None:
        if not names:
            return
        problem = f"{len(names)} of the {count} images in '{self.root}' have no map in '{self.maps_folder}'"
        expected = f"'{_stem(names[0])}{self.suffix}' with any extension for '{names[0]}'"
        if len(names) > allowed_unreadable(self.max_unreadable, count) or len(names) == count:
            raise UserError(f"data.conditions: {problem}; looked for {expected}")
        log.warning(f"data.conditions: {problem}; the next pairs take their places. Looked for {expected}")


class PairSplit(PairedImageSplit):
    """Training or validation pairs of two folders."""

    def __init__(self, data: Pairs, split_name: str, files: Sequence[File], maps: Sequence[File | None]) -> None:
        self.map_names = PackedStrings(file.name if file else "" for file in maps)
        self.maps_folder, self.map_decoder = data.maps_folder, data.map_decoder
        content = [data.map_decoder.fingerprint_fields, *map(tuple, files), *(file and tuple(file) for file in maps)]
        super().__init__(data, split_name, PackedStrings(file.name for file in files), None, content)

    def open_map(self, index: int) -> Path:
        return self.maps_folder / self.map_names[index]


def _maps_by_stem(files: Iterable[File], suffix: str) -> dict[str, File]:
    maps: dict[str, File] = {}
    for file in files:
        stem = _stem(file.name).removesuffix(suffix)
        if stem in maps:
            raise UserError(f"data.conditions: '{maps[stem].name}' and '{file.name}' are maps of the same image")
        maps[stem] = file
    return maps


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0]

"""The images of a run as its page shows them."""

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vqf.loggers.image_grid import GRID_ERRORS, SMALL_SIDE, images_per_item, split_grid
from vqf.loggers.report.run_parts import RunPart, latest_images
from vqf.run_files.aside import warn_once

WEBP_QUALITY = 90  # of images from SMALL_SIDE on; smaller ones are lossless

TITLES = {
    "reconstructions": "Reconstructions",
    "best": "Best reconstructions",
    "worst": "Worst reconstructions",
    "samples": "Samples",
    "conditions": "Conditional samples",
    "completions": "Completions",
}
CAPTIONS = {
    "reconstructions": "Validation images, not used in training, each beside its reconstruction.",
    "best": "The smallest errors of all validation images, the original on the left.",
    "worst": "The largest errors of all validation images, the original on the left.",
    "samples": "New images, drawn by the prior code by code.",
    "conditions": "The condition that the prior was given, and the sample.",
    "completions": "Validation images: the original, the part that the prior is given, and the completion.",
}
SHOWN_ELSEWHERE = {"codes"}  # in the section about the codebook


@dataclass
class GalleryItem:
    """Images that belong together, with their caption."""

    images: list[str]  # data: URIs
    caption: str = ""


@dataclass
class Group:
    """The items of one class."""

    items: list[GalleryItem]
    title: str = ""


@dataclass
class Gallery:
    """All images of one kind."""

    name: str
    title: str
    caption: str
    subrun: str  # heading of the stage, where two galleries have the same title; else ""
    groups: list[Group]
    images_per_item: int = 1

    @property
    def has_classes(self) -> bool:
        return any(group.title for group in self.groups)

    @property
    def count(self) -> int:
        return sum(len(group.items) for group in self.groups)


def read_galleries(run_dir: Path, parts: Iterable[RunPart]) -> list[Gallery]:
    """Read the newest images of a run and its stages."""
    galleries = [
        gallery
        for name, part, path in _latest_images(run_dir, parts)
        if name not in SHOWN_ELSEWHERE and (gallery := read_gallery(name, part.heading, path, part.details)) is not None
    ]
    titles = [gallery.title for gallery in galleries]
    for gallery in galleries:
        gallery.subrun = gallery.subrun if titles.count(gallery.title) > 1 else ""
    order = [*TITLES, *(gallery.name for gallery in galleries)]
    return sorted(galleries, key=lambda gallery: order.index(gallery.name))


def read_gallery(name: str, heading: str, path: Path, details: Mapping[str, Any]) -> Gallery | None:
    """Split a grid into a gallery; None if the file is broken."""
    if not (tiles := _read_tiles(path)):
        return None
    size = images_per_item(name) if len(tiles) % images_per_item(name) == 0 else 1
    info = details.get(name, {})
    captions = info.get("captions", [])
    items = [
        GalleryItem(tiles[i : i + size], captions[i // size] if i // size < len(captions) else "")
        for i in range(0, len(tiles), size)
    ]
    kind, _, rest = name.partition("-")
    title = " · ".join(filter(None, [TITLES.get(kind, kind.replace("_", " ").capitalize()), rest]))
    caption = info.get("caption") or CAPTIONS.get(kind, "")
    return Gallery(kind, title, caption, heading, _group_by_class(items, info.get("labels", [])), size)


def to_data_uri(image: Image.Image) -> str:
    """Encode an image as a data: URI; small images without loss."""
    file = io.BytesIO()
    small = max(image.size) < SMALL_SIDE
    image.save(file, format="WEBP", lossless=small, quality=100 if small else WEBP_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def code_mosaic(parts: Iterable[RunPart]) -> tuple[str, Mapping[str, Any]] | None:
    """Return a data: URI, or "", and details of the codes."""
    for part in parts:
        details = part.details.get("codes", {})
        if details.get("counts"):
            path = latest_images(part.folder).get("codes")
            return (_mosaic(path) if path else "", details)
    return None


def _mosaic(path: Path) -> str:
    return next(iter(_read_tiles(path)), "")


def _read_tiles(path: Path) -> list[str]:
    """Return the images of a grid as data: URIs; [] if the file is damaged, which is said."""
    try:
        return [to_data_uri(tile) for tile in split_grid(path)]
    except GRID_ERRORS as error:
        warn_once(f"{path}: cannot be read ({error}); left out")
        return []


def _latest_images(run_dir: Path, parts: Iterable[RunPart]) -> Iterator[tuple[str, RunPart, Path]]:
    """Yield name, part and newest file; stages come first, with their captions."""
    seen: set[str] = set()
    own = RunPart(run_dir)
    for part in (*(part for part in parts if part.name), own):
        for name, path in latest_images(part.folder).items():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            if content not in seen:  # pipeline=full logs the images of its stages again
                seen.add(content)
                yield name, part, path


def _group_by_class(items: Sequence[GalleryItem], labels: Sequence[str]) -> list[Group]:
    if len(labels) < len(items):
        return [Group(list(items))]
    if len(set(labels)) == len(items):
        return [Group([GalleryItem(item.images, label) for item, label in zip(items, labels, strict=False)])]
    groups: dict[str, Group] = {}
    for item, label in zip(items, labels, strict=False):
        groups.setdefault(label, Group([], label)).items.append(item)
    return list(groups.values())

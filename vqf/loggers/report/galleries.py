"""The images of a run as a page shows them: each by itself, with what belongs together side by side."""

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vqf.loggers.image_grid import SMALL_SIDE, images_per_item, split_grid
from vqf.loggers.report.run_files import RunPart, latest_images, read_json

WEBP_QUALITY = 90  # of WebP, for images that are not small

TITLES = {
    "reconstructions": "Reconstructions",
    "best": "The best of them",
    "worst": "The worst of them",
    "samples": "Samples",
    "conditions": "Drawn by a condition",
    "completions": "Completions",
}
CAPTIONS = {
    "reconstructions": "Held-out images, which training never saw: each beside what came back through its codes.",
    "best": "The smallest errors of all held-out images, the original on the left.",
    "worst": "The largest errors of all held-out images, the original on the left: what the codes cannot say.",
    "samples": "New images, drawn by the prior code by code.",
    "conditions": "What the prior was told, and what it drew.",
    "completions": "Held-out images: whole, the part that the prior is shown, and what it makes of it.",
}
SHOWN_ELSEWHERE = {"codes"}  # shown with the codebook


@dataclass
class GalleryItem:
    """Images that belong together, and what is written under them."""

    images: list[str]  # data: addresses
    caption: str = ""


@dataclass
class Group:
    """Units of one class; without a title where there are no classes."""

    items: list[GalleryItem]
    title: str = ""


@dataclass
class Gallery:
    """One kind of image."""

    name: str
    title: str
    caption: str
    subrun: str  # the stage that they are of; empty where that is clear
    groups: list[Group]
    images_per_item: int = 1

    @property
    def has_classes(self) -> bool:
        """Whether the groups are classes."""
        return any(group.title for group in self.groups)

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(len(group.items) for group in self.groups)


def read_galleries(run_dir: Path, parts: Iterable[RunPart]) -> list[Gallery]:
    """Return the newest images of a run and of its stages, each once, in the order of their titles here."""
    found = [
        (name, part, read_gallery(name, part.heading, path, read_json(part.folder / "details.json")))
        for name, part, path in _latest_images(run_dir, parts)
        if name not in SHOWN_ELSEWHERE
    ]
    shown = [each for _, _, each in found if each is not None]
    titles = [each.title for each in shown]
    for each in shown:
        each.subrun = each.subrun if titles.count(each.title) > 1 else ""
    order = [*TITLES, *(each.name for each in shown)]
    return sorted(shown, key=lambda each: order.index(each.name))


def read_gallery(name: str, heading: str, path: Path, details: Mapping[str, Any]) -> Gallery | None:
    """Take the images of a file apart; None where it is broken."""
    try:
        tiles = [to_data_uri(tile) for tile in split_grid(path)]
    except (OSError, ValueError, LookupError, TypeError):  # cut short by a process that was killed
        return None
    several = images_per_item(name) if len(tiles) % images_per_item(name) == 0 else 1
    said = details.get(name, {})
    captions = said.get("captions", [])
    units = [
        GalleryItem(tiles[i : i + several], captions[i // several] if i // several < len(captions) else "")
        for i in range(0, len(tiles), several)
    ]
    kind, _, rest = name.partition("-")
    title = " · ".join(filter(None, [TITLES.get(kind, kind.replace("_", " ").capitalize()), rest]))
    caption = said.get("caption") or CAPTIONS.get(kind, "")
    return Gallery(kind, title, caption, heading, _group_by_class(units, said.get("labels", [])), several)


def to_data_uri(image: Image.Image) -> str:
    """Return an image as a data: address, without loss where it is small."""
    file = io.BytesIO()
    small = max(image.size) < SMALL_SIDE
    image.save(file, format="WEBP", lossless=small, quality=100 if small else WEBP_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def code_mosaic(parts: Iterable[RunPart]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the mosaic of the first stage that has one, and what is known of its codes."""
    for part in parts:
        details = read_json(part.folder / "details.json").get("codes")
        if isinstance(details, dict) and details.get("counts"):
            path = latest_images(part.folder).get("codes")
            return (_mosaic(path) if path else "", details)
    return None


def _mosaic(path: Path) -> str:
    try:
        return to_data_uri(split_grid(path)[0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _latest_images(run_dir: Path, parts: Iterable[RunPart]) -> Iterator[tuple[str, RunPart, Path]]:
    """Yield the newest image of every name, stages first: what they say of it is beside it."""
    seen: set[str] = set()
    own = RunPart(run_dir, "", {}, {}, 0.0)
    for part in (*(part for part in parts if part.name), own):
        for name, path in latest_images(part.folder).items():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            if content not in seen:
                seen.add(content)
                yield name, part, path


def _group_by_class(items: Sequence[GalleryItem], labels: Sequence[str]) -> list[Group]:
    """Put units of one class together, in the order in which classes come first."""
    if len(labels) < len(items):
        return [Group(list(items))]
    if len(set(labels)) == len(items):  # one of each: the class is written under it
        return [Group([GalleryItem(unit.images, label) for unit, label in zip(items, labels, strict=False)])]
    groups: dict[str, Group] = {}
    for unit, label in zip(items, labels, strict=False):
        groups.setdefault(label, Group([], label)).items.append(unit)
    return list(groups.values())

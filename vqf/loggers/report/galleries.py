"""The pictures of a run as a page shows them: each by itself, with what belongs together side by side."""

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vqf.loggers.image_grid import SMALL, cut, together
from vqf.loggers.report.run_files import Part, pictures, read_json

QUALITY = 90  # of WebP, for pictures that are not small

TITLES = {
    "reconstructions": "Reconstructions",
    "best": "The best of them",
    "worst": "The worst of them",
    "samples": "Samples",
    "conditions": "Drawn by a condition",
    "completions": "Completions",
}
CAPTIONS = {
    "reconstructions": "Held-out pictures, which training never saw: each beside what came back through its codes.",
    "best": "The smallest errors of all held-out pictures, the original on the left.",
    "worst": "The largest errors of all held-out pictures, the original on the left: what the codes cannot say.",
    "samples": "New pictures, drawn by the prior code by code.",
    "conditions": "What the prior was told, and what it drew.",
    "completions": "Held-out pictures: whole, the part that the prior is shown, and what it makes of it.",
}
ELSEWHERE = {"codes"}  # shown with the codebook


@dataclass
class Unit:
    """Pictures that belong together, and what is written under them."""

    pictures: list[str]  # data: addresses
    caption: str = ""


@dataclass
class Group:
    """Units of one class; without a title where there are no classes."""

    units: list[Unit]
    title: str = ""


@dataclass
class Gallery:
    """One kind of picture."""

    name: str
    title: str
    caption: str
    part: str  # the stage that they are of; empty where that is clear
    groups: list[Group]
    together: int = 1

    @property
    def classes(self) -> bool:
        """Whether the groups are classes."""
        return any(group.title for group in self.groups)

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(len(group.units) for group in self.groups)


def galleries(run_dir: Path, parts: Iterable[Part]) -> list[Gallery]:
    """Return the newest pictures of a run and of its stages, each once, in the order of their titles here."""
    found = [
        (name, part, gallery(name, part.heading, path, read_json(part.folder / "details.json")))
        for name, part, path in _files(run_dir, parts)
        if name not in ELSEWHERE
    ]
    shown = [each for _, _, each in found if each is not None]
    titles = [each.title for each in shown]
    for each in shown:
        each.part = each.part if titles.count(each.title) > 1 else ""
    order = [*TITLES, *(each.name for each in shown)]
    return sorted(shown, key=lambda each: order.index(each.name))


def gallery(name: str, heading: str, path: Path, details: Mapping[str, Any]) -> Gallery | None:
    """Take the pictures of a file apart; None where it is broken."""
    try:
        tiles = [address(tile) for tile in cut(path)]
    except (OSError, ValueError, LookupError, TypeError):  # cut short by a process that was killed
        return None
    several = together(name) if len(tiles) % together(name) == 0 else 1
    said = details.get(name, {})
    captions = said.get("captions", [])
    units = [
        Unit(tiles[i : i + several], captions[i // several] if i // several < len(captions) else "")
        for i in range(0, len(tiles), several)
    ]
    kind, _, rest = name.partition("-")
    title = " · ".join(filter(None, [TITLES.get(kind, kind.replace("_", " ").capitalize()), rest]))
    caption = said.get("caption") or CAPTIONS.get(kind, "")
    return Gallery(kind, title, caption, heading, _grouped(units, said.get("labels", [])), several)


def address(picture: Image.Image) -> str:
    """Return a picture as a data: address, without loss where it is small."""
    file = io.BytesIO()
    small = max(picture.size) < SMALL
    picture.save(file, format="WEBP", lossless=small, quality=100 if small else QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def codes_picture(parts: Iterable[Part]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the mosaic of the first stage that has one, and what is known of its codes."""
    for part in parts:
        details = read_json(part.folder / "details.json").get("codes")
        if isinstance(details, dict) and details.get("counts"):
            path = pictures(part.folder).get("codes")
            return (_mosaic(path) if path else "", details)
    return None


def _mosaic(path: Path) -> str:
    try:
        return address(cut(path)[0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _files(run_dir: Path, parts: Iterable[Part]) -> Iterator[tuple[str, Part, Path]]:
    """Yield the newest picture of every name, stages first: what they say of it is beside it."""
    seen: set[str] = set()
    own = Part(run_dir, "", {}, {}, 0.0)
    for part in (*(part for part in parts if part.name), own):
        for name, path in pictures(part.folder).items():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            if content not in seen:
                seen.add(content)
                yield name, part, path


def _grouped(units: Sequence[Unit], labels: Sequence[str]) -> list[Group]:
    """Put units of one class together, in the order in which classes come first."""
    if len(labels) < len(units):
        return [Group(list(units))]
    if len(set(labels)) == len(units):  # one of each: the class is written under it
        return [Group([Unit(unit.pictures, label) for unit, label in zip(units, labels, strict=False)])]
    groups: dict[str, Group] = {}
    for unit, label in zip(units, labels, strict=False):
        groups.setdefault(label, Group([], label)).units.append(unit)
    return list(groups.values())

"""Look through a data set before training on it: what it holds, what is broken, what is there twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any, Protocol, runtime_checkable

import torch
from omegaconf import DictConfig

from vqf import terminal
from vqf.batch import Size
from vqf.config.access import image_size
from vqf.dataloading.image_files import Files, open_parts, spread
from vqf.errors import UserError, quoted
from vqf.hashing import sha256
from vqf.protocols import Split
from vqf.registry import register
from vqf.terminal import log, progress

AT_ONCE = 64  # pictures that a process is handed
LISTED = 10  # kinds of anything that the table names; the file names all
NAMED = 5  # broken and double pictures that the terminal names; the file names all


@dataclass(frozen=True)
class Seen:
    """What a picture turned out to be; `broken` is why nothing is known."""

    part: str
    name: str
    digest: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    broken: str = ""


@register("pipeline", "check")
class Check:
    """Decode every picture of `data`, and say how many, of which sizes, modes and formats, which broken or double."""

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def run(self) -> None:
        """Print a table and write `check.json`."""
        data, parts = open_parts(self.config)
        files = {part: split for part, split in parts.items() if isinstance(split, Files)}
        if len(files) < len(parts):
            raise UserError(f"data '{self.config.data.name}' keeps no files that could be checked (a stream neither)")
        counts = {part: len(split) for part, split in parts.items()}
        tasks = [(part, first) for part, count in counts.items() for first in range(0, count, AT_ONCE)]
        seen = []
        with progress("check", sum(counts.values())) as bar:
            for some in spread(Looker(files, counts), tasks, self.config.workers):
                seen += some
                bar.advance(len(some))
        report = summary(seen, list(parts), image_size(self.config))
        for part, split in parts.items():
            report["parts"][part]["classes"] = _classes(split, data.classes)
        if isinstance(data, Hashed):
            report["damaged_shards"] = self._damaged(data.digests())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        _tell(report)
        log.info("written: %s", self.run_dir / "check.json")

    def _damaged(self, known: Mapping[Path, str]) -> list[str]:
        """Return the shards that are not what their manifest says."""
        with progress("verify shards", len(known)) as bar:
            found = []
            for path, digest in spread(_hashed, list(known), self.config.workers):
                found += [path.name] if digest != known[path] else []
                bar.advance()
        return sorted(found)


@runtime_checkable
class Hashed(Protocol):
    """A source that knows the sha256 of its files."""

    def digests(self) -> Mapping[Path, str]: ...


def _hashed(path: Path) -> tuple[Path, str]:
    return path, sha256(path)


@dataclass(frozen=True)
class Looker:
    """Looks at pictures, in any process."""

    parts: Mapping[str, Files]
    counts: Mapping[str, int]

    def __call__(self, task: tuple[str, int]) -> list[Seen]:
        """Look at the pictures of a part from one on."""
        part, first = task
        return [self._look(part, index) for index in range(first, min(first + AT_ONCE, self.counts[part]))]

    def _look(self, part: str, index: int) -> Seen:
        name, file = self.parts[part].names[index], self.parts[part].file(index)
        try:
            content = file.stored()
            return Seen(part, name, hashlib.sha256(content).hexdigest(), *file.facts(content))
        except ValueError as error:
            return Seen(part, name, broken=str(error))


def summary(seen: Iterable[Seen], parts: Iterable[str], size: Size) -> dict[str, Any]:
    """Count what was seen: a part each, and what is there twice in either; `size` is the one that is wanted."""
    ordered = sorted(seen, key=lambda each: (each.part, each.name))
    twins: dict[str, list[Seen]] = {}
    for each in ordered:
        if not each.broken:
            twins.setdefault(each.digest, []).append(each)
    double = [group for group in twins.values() if len(group) > 1]
    return {
        "parts": {part: _part([each for each in ordered if each.part == part], size) for part in parts},
        "duplicates": [[f"{each.part}: {each.name}" for each in group] for group in double],
        "in_both_parts": sum(len({each.part for each in group}) > 1 for group in double),
    }


def _classes(split: Split, names: Sequence[str]) -> dict[str, int]:
    """Count the pictures of every class; nothing where there are none."""
    labels = getattr(split, "labels", None)
    if labels is None:
        return {}
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _part(seen: list[Seen], size: Size) -> dict[str, Any]:
    good = [each for each in seen if not each.broken]
    return {
        "pictures": len(seen),
        "unreadable": {each.name: each.broken for each in seen if each.broken},
        "width": _spread(each.width for each in good),
        "height": _spread(each.height for each in good),
        "shorter_side": _spread(min(each.width, each.height) for each in good),
        "to_be_enlarged": sum(each.height < size[0] or each.width < size[1] for each in good),
        "modes": dict(Counter(each.mode for each in good).most_common()),
        "formats": dict(Counter(each.format for each in good).most_common()),
    }


def _spread(values: Iterable[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": median_low(ordered), "max": ordered[-1]} if ordered else {}


def _tell(report: Mapping[str, Any]) -> None:
    parts = report["parts"]
    rows = [
        (key.replace("_", " "), *(_words(part[key]) for part in parts.values())) for key in next(iter(parts.values()))
    ]
    terminal.table("check", ("", *parts), rows)
    for name, part in parts.items():
        for picture, why in list(part["unreadable"].items())[:NAMED]:
            log.warning("%s: cannot read %s (%s)", name, quoted(picture), why)
    for shard in report.get("damaged_shards", ()):
        log.warning("'%s' is not the shard whose sha256 is in manifest.json", shard)
    double = report["duplicates"]
    copies = sum(len(group) for group in double) - len(double)
    log.info("exact copies: %d, of %d pictures; in both parts: %d", copies, len(double), report["in_both_parts"])
    for group in double[:NAMED]:
        log.info("the same: %s", ", ".join(group[:NAMED]))


def _words(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "median" in value:
        return f"{value['min']} / {value['median']} / {value['max']}"
    counts = [each for each in value.values() if isinstance(each, int)]
    if len(counts) > LISTED:
        return f"{len(counts)}, of {min(counts)} to {max(counts)}"
    if len(counts) == len(value):
        return ", ".join(f"{key} {count}" for key, count in value.items()) or "0"
    return str(len(value))

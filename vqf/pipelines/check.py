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
from vqf.dataloading.image_files import ImageFileSplit, open_splits, process_map
from vqf.errors import UserError, quote_name
from vqf.hashing import sha256_of_file
from vqf.protocols import Split
from vqf.registry import register
from vqf.terminal import log, progress

CHUNK_SIZE = 64  # images that a process is handed
MAX_TABLE_KINDS = 10  # kinds of anything that the table names; the file names all
MAX_LISTED = 5  # broken and double images that the terminal names; the file names all


@dataclass(frozen=True)
class ImageFacts:
    """What an image turned out to be; `error` is why nothing is known."""

    split_name: str
    name: str
    digest: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


@register("pipeline", "check")
class Check:
    """Decode every image of `data`, and say how many, of which sizes, modes and formats, which broken or double."""

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def run(self) -> None:
        """Print a table and write `check.json`."""
        data, parts = open_splits(self.config)
        files = {part: split for part, split in parts.items() if isinstance(split, ImageFileSplit)}
        if len(files) < len(parts):
            raise UserError(f"data '{self.config.data.name}' keeps no files that could be checked (a stream neither)")
        counts = {part: len(split) for part, split in parts.items()}
        tasks = [(part, first) for part, count in counts.items() for first in range(0, count, CHUNK_SIZE)]
        seen = []
        with progress("check", sum(counts.values())) as bar:
            for some in process_map(ImageChecker(files, counts), tasks, self.config.workers):
                seen += some
                bar.advance(len(some))
        report = summarize(seen, list(parts), image_size(self.config))
        for part, split in parts.items():
            report["parts"][part]["classes"] = _classes(split, data.classes)
        if isinstance(data, HasDigests):
            report["damaged_shards"] = self._damaged_shards(data.digests())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        _print_report(report)
        log.info("written: %s", self.run_dir / "check.json")

    def _damaged_shards(self, known: Mapping[Path, str]) -> list[str]:
        """Return the shards that are not what their manifest says."""
        with progress("verify shards", len(known)) as bar:
            found = []
            for path, digest in process_map(_path_and_sha256, list(known), self.config.workers):
                found += [path.name] if digest != known[path] else []
                bar.advance()
        return sorted(found)


@runtime_checkable
class HasDigests(Protocol):
    """A source that knows the sha256 of its files."""

    def digests(self) -> Mapping[Path, str]: ...


def _path_and_sha256(path: Path) -> tuple[Path, str]:
    return path, sha256_of_file(path)


@dataclass(frozen=True)
class ImageChecker:
    """Looks at images, in any process."""

    splits: Mapping[str, ImageFileSplit]
    counts: Mapping[str, int]

    def __call__(self, task: tuple[str, int]) -> list[ImageFacts]:
        """Look at the images of a part from one on."""
        part, first = task
        return [self._inspect(part, index) for index in range(first, min(first + CHUNK_SIZE, self.counts[part]))]

    def _inspect(self, part: str, index: int) -> ImageFacts:
        name, file = self.splits[part].names[index], self.splits[part].file(index)
        try:
            content = file.read_bytes()
            return ImageFacts(part, name, hashlib.sha256(content).hexdigest(), *file.probe(content))
        except ValueError as error:
            return ImageFacts(part, name, error=str(error))


def summarize(seen: Iterable[ImageFacts], parts: Iterable[str], size: Size) -> dict[str, Any]:
    """Count what was seen: a part each, and what is there twice in either; `size` is the one that is wanted."""
    ordered = sorted(seen, key=lambda each: (each.split_name, each.name))
    twins: dict[str, list[ImageFacts]] = {}
    for each in ordered:
        if not each.error:
            twins.setdefault(each.digest, []).append(each)
    double = [group for group in twins.values() if len(group) > 1]
    return {
        "parts": {
            part: _summarize_split([each for each in ordered if each.split_name == part], size) for part in parts
        },
        "duplicates": [[f"{each.split_name}: {each.name}" for each in group] for group in double],
        "in_both_parts": sum(len({each.split_name for each in group}) > 1 for group in double),
    }


def _classes(split: Split, names: Sequence[str]) -> dict[str, int]:
    """Count the images of every class; nothing where there are none."""
    labels = getattr(split, "labels", None)
    if labels is None:
        return {}
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _summarize_split(seen: list[ImageFacts], size: Size) -> dict[str, Any]:
    good = [each for each in seen if not each.error]
    return {
        "images": len(seen),
        "unreadable": {each.name: each.error for each in seen if each.error},
        "width": _min_median_max(each.width for each in good),
        "height": _min_median_max(each.height for each in good),
        "shorter_side": _min_median_max(min(each.width, each.height) for each in good),
        "to_be_enlarged": sum(each.height < size[0] or each.width < size[1] for each in good),
        "modes": dict(Counter(each.mode for each in good).most_common()),
        "formats": dict(Counter(each.format for each in good).most_common()),
    }


def _min_median_max(values: Iterable[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": median_low(ordered), "max": ordered[-1]} if ordered else {}


def _print_report(report: Mapping[str, Any]) -> None:
    parts = report["parts"]
    rows = [
        (key.replace("_", " "), *(_format_cell(part[key]) for part in parts.values()))
        for key in next(iter(parts.values()))
    ]
    terminal.print_table("check", ("", *parts), rows)
    for name, part in parts.items():
        for image, why in list(part["unreadable"].items())[:MAX_LISTED]:
            log.warning("%s: cannot read %s (%s)", name, quote_name(image), why)
    for shard in report.get("damaged_shards", ()):
        log.warning("'%s' is not the shard whose sha256 is in manifest.json", shard)
    double = report["duplicates"]
    copies = sum(len(group) for group in double) - len(double)
    log.info("exact copies: %d, of %d images; in both parts: %d", copies, len(double), report["in_both_parts"])
    for group in double[:MAX_LISTED]:
        log.info("the same: %s", ", ".join(group[:MAX_LISTED]))


def _format_cell(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "median" in value:
        return f"{value['min']} / {value['median']} / {value['max']}"
    counts = [each for each in value.values() if isinstance(each, int)]
    if len(counts) > MAX_TABLE_KINDS:
        return f"{len(counts)}, of {min(counts)} to {max(counts)}"
    if len(counts) == len(value):
        return ", ".join(f"{key} {count}" for key, count in value.items()) or "0"
    return str(len(value))

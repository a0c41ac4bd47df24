"""Check a data set before training on it."""

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
from vqf.dataloading.image_files import ImageFileSplit
from vqf.dataloading.splits import open_splits
from vqf.dataloading.worker_pool import process_map
from vqf.errors import UserError, quote_name
from vqf.hashing import sha256_of_file
from vqf.protocols import Labelled, Split
from vqf.registry import register
from vqf.terminal import collect_messages, log, progress

CHUNK_SIZE = 64  # images per task of a worker process
MAX_TABLE_KINDS = 10  # classes, modes or formats that the table names; check.json names all
MAX_LISTED = 5  # unreadable and duplicate images that the terminal names; check.json names all


@dataclass(frozen=True)
class ImageFacts:
    """Facts of an image; only `error` is set if it cannot be read."""

    split_name: str
    name: str
    digest: str = ""  # sha256 of the file
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    least: float = 0  # value of a pixel
    largest: float = 0
    error: str = ""


@register("pipeline", "check")
class Check:
    """Decode every image of `data`; report counts, sizes, modes, values, formats, unreadable images and duplicates.

    The lines about what the data source leaves out, or reads in one of two ways, are `messages` of `check.json`.
    """

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def run(self) -> None:
        """Print a table and write `check.json`.

        Raises:
            UserError: If the data source has no image files.
        """
        with collect_messages() as messages:  # what is left out, and which of two readings is taken
            data, splits = open_splits(self.config)
        report = summarize(self._inspect_images(splits), list(splits), image_size(self.config))
        report["messages"] = messages
        for name, split in splits.items():
            report["splits"][name]["classes"] = _class_counts(split, data.classes)
        if isinstance(data, HasDigests):
            report["damaged_shards"] = self._damaged_shards(data.digests())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        _print_report(report)
        log.info("written: %s", self.run_dir / "check.json")

    def _inspect_images(self, splits: Mapping[str, Split]) -> list[ImageFacts]:
        file_splits = {name: split for name, split in splits.items() if isinstance(split, ImageFileSplit)}
        if len(file_splits) < len(splits):
            raise UserError(
                f"data '{self.config.data.name}' has no image files to check: it generates or streams its images"
            )
        counts = {name: len(split) for name, split in splits.items()}
        tasks = [(name, first) for name, count in counts.items() for first in range(0, count, CHUNK_SIZE)]
        facts = []
        with progress("check", sum(counts.values())) as bar:
            for chunk in process_map(ImageChecker(file_splits, counts), tasks, self.config.workers):
                facts += chunk
                bar.advance(len(chunk))
        return facts

    def _damaged_shards(self, expected: Mapping[Path, str]) -> list[str]:
        damaged = []
        with progress("verify shards", len(expected)) as bar:
            for path, digest in process_map(_path_and_sha256, list(expected), self.config.workers):
                damaged += [path.name] if digest != expected[path] else []
                bar.advance()
        return sorted(damaged)


@runtime_checkable
class HasDigests(Protocol):
    """A data source that knows the sha256 of its files."""

    def digests(self) -> Mapping[Path, str]: ...


def _path_and_sha256(path: Path) -> tuple[Path, str]:
    return path, sha256_of_file(path)


@dataclass(frozen=True)
class ImageChecker:
    """Inspects chunks of images in a worker process."""

    splits: Mapping[str, ImageFileSplit]
    counts: Mapping[str, int]  # images per split

    def __call__(self, task: tuple[str, int]) -> list[ImageFacts]:
        """Inspect up to `CHUNK_SIZE` images; `task` is the split's name and the first index."""
        name, first = task
        return [self._inspect(name, index) for index in range(first, min(first + CHUNK_SIZE, self.counts[name]))]

    def _inspect(self, split_name: str, index: int) -> ImageFacts:
        split = self.splits[split_name]
        name, file = split.names[index], split.file(index)
        try:
            content = file.read_bytes()
            return ImageFacts(split_name, name, hashlib.sha256(content).hexdigest(), *file.probe(content))
        except ValueError as error:
            return ImageFacts(split_name, name, error=str(error))


def summarize(images: Iterable[ImageFacts], split_names: Iterable[str], size: Size) -> dict[str, Any]:
    """Summarize each split, and list duplicates across all.

    Args:
        size: Height and width of training; smaller images count as upscaled.
    """
    ordered = sorted(images, key=lambda facts: (facts.split_name, facts.name))
    by_digest: dict[str, list[ImageFacts]] = {}
    for facts in ordered:
        if not facts.error:
            by_digest.setdefault(facts.digest, []).append(facts)
    duplicates = [group for group in by_digest.values() if len(group) > 1]
    return {
        "splits": {
            name: _summarize_split([facts for facts in ordered if facts.split_name == name], size)
            for name in split_names
        },
        "duplicates": [[f"{facts.split_name}: {facts.name}" for facts in group] for group in duplicates],
        "in_both_splits": sum(len({facts.split_name for facts in group}) > 1 for group in duplicates),
    }


def _class_counts(split: Split, names: Sequence[str]) -> dict[str, int]:
    if not isinstance(split, Labelled) or split.labels is None:
        return {}
    counts = torch.bincount(split.labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _summarize_split(images: list[ImageFacts], size: Size) -> dict[str, Any]:
    readable = [facts for facts in images if not facts.error]
    return {
        "images": len(images),
        "unreadable": {facts.name: facts.error for facts in images if facts.error},
        "width": _min_median_max(facts.width for facts in readable),
        "height": _min_median_max(facts.height for facts in readable),
        "shorter_side": _min_median_max(min(facts.width, facts.height) for facts in readable),
        "upscaled": sum(facts.height < size[0] or facts.width < size[1] for facts in readable),
        "modes": dict(Counter(facts.mode for facts in readable).most_common()),
        "values": _values_by_mode(readable),
        "formats": dict(Counter(facts.format for facts in readable).most_common()),
    }


def _values_by_mode(images: Sequence[ImageFacts]) -> dict[str, list[float]]:
    """Return the least and largest value of all images of each mode."""
    modes = sorted({facts.mode for facts in images})
    by_mode = {mode: [facts for facts in images if facts.mode == mode] for mode in modes}
    return {
        mode: [min(each.least for each in group), max(each.largest for each in group)]
        for mode, group in by_mode.items()
    }


def _min_median_max(values: Iterable[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": median_low(ordered), "max": ordered[-1]} if ordered else {}


def _print_report(report: Mapping[str, Any]) -> None:
    splits = report["splits"]
    rows = [
        (key.replace("_", " "), *(_format_cell(summary[key]) for summary in splits.values()))
        for key in next(iter(splits.values()))
    ]
    terminal.print_table("check", ("", *splits), rows)
    for split_name, summary in splits.items():
        for image, reason in list(summary["unreadable"].items())[:MAX_LISTED]:
            log.warning("%s: cannot read %s (%s)", split_name, quote_name(image), reason)
    for shard in report.get("damaged_shards", ()):
        log.warning("shard '%s' is damaged: its sha256 differs from manifest.json", shard)
    _log_duplicates(report["duplicates"], report["in_both_splits"])


def _log_duplicates(groups: Sequence[Sequence[str]], in_both_splits: int) -> None:
    copies = sum(len(group) for group in groups) - len(groups)
    log.info("exact copies: %d, of %d images; in both splits: %d", copies, len(groups), in_both_splits)
    for group in groups[:MAX_LISTED]:
        log.info("identical: %s", ", ".join(group[:MAX_LISTED]))


def _format_cell(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "median" in value:
        return f"{value['min']} / {value['median']} / {value['max']}"
    if value and all(isinstance(limits, list) for limits in value.values()):
        return ", ".join(f"{mode} {low:g} to {high:g}" for mode, (low, high) in value.items())
    counts = [count for count in value.values() if isinstance(count, int)]
    if len(counts) > MAX_TABLE_KINDS:
        return f"{len(counts)}, of {min(counts)} to {max(counts)}"
    if len(counts) == len(value):
        return ", ".join(f"{key} {count}" for key, count in value.items()) or "0"
    return str(len(value))

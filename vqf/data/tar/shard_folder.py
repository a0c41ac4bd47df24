"""Index the shards in a folder, and compare them with their manifest."""

import logging
from collections.abc import Mapping
from pathlib import Path

from vqf.data.files.packed import gc_paused
from vqf.data.files.read_errors import allowed_unreadable
from vqf.data.labels import NumericLabels, class_numbers
from vqf.data.tar.contents import LOST_LABEL, IndexedShards, SampleIndexBuilder, iter_samples, load_indices
from vqf.data.tar.index_file import INDEX_SUFFIX
from vqf.data.tar.inventory import MemberInventory
from vqf.data.tar.manifest import MANIFEST_NAME, class_names, listed_shards, read_manifest
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.patterns import find_shards
from vqf.data.tar.reader import TarReader
from vqf.errors import UserError

log = logging.getLogger("vqf")

MAX_LISTED = 5  # shards in one log line


class ShardFolder:
    """A folder of shards with its manifest.

    Args:
        max_unreadable: Fraction of missing images, and of damaged shards, above which `index_splits` raises.

    Raises:
        UserError: If there is no such folder.
    """

    def __init__(self, root: str | None, index: Path | None, roles: SampleMembers, max_unreadable: float) -> None:
        if root is None:
            raise UserError("data.root: give the folder of the shards, or its URL")
        self.root, self.index, self.member_roles = Path(root).expanduser(), index, roles
        self.max_unreadable = max_unreadable
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder '{root}'; point data.root to a folder of tar shards")
        self.manifest = read_manifest(self.root)
        self.manifest_shards = listed_shards(self.manifest)
        self.contents: dict[str, IndexedShards] = {}

    def index_splits(self, patterns: Mapping[str, str | None], labels: bool) -> None:
        """Set `contents`, the samples of each split.

        Raises:
            UserError: If no split has images, or too many images or shards are damaged.
        """
        if self.manifest.get("finished") is False:
            log.warning(
                f"data.root: {MANIFEST_NAME} in '{self.root}' says that pipeline=shard has not finished writing it"
            )
        with gc_paused():
            self.contents = {name: self._index_split(name, pattern, labels) for name, pattern in patterns.items()}
        self._log_other_tars(patterns)
        if not any(content.names for content in self.contents.values()):
            options = " and ".join(f"data.{name}={pattern}" for name, pattern in patterns.items())
            raise UserError(f"data.root: no images in shards of '{self.root}'; {options}")

    def class_numbers(
        self, count: int | None, numeric_labels: NumericLabels
    ) -> tuple[list[str], dict[int | str | None, int]]:
        """Return class names, and class numbers; empty unless all splits with images have labels.

        Raises:
            UserError: If a label is not below `count`.
        """
        labels = self._labels()
        if count is not None and (wrong := [label for label in labels if isinstance(label, str) or label >= count]):
            raise UserError(f"data.classes={count}: the label {max(wrong, key=str)!r} is not a number below {count}")
        names, numbers_as_names = class_names(self.manifest), [str(i) for i in range(count or 0)]
        names = names if len(names) >= len(numbers_as_names) else numbers_as_names
        classes, numbers = class_numbers(labels, names, numeric_labels)
        if labels and (unused := class_names(self.manifest)) and len(unused) < len(classes):
            log.info(
                f"data.root: {MANIFEST_NAME} in '{self.root}' names {len(unused)} classes, but there are "
                f"{len(classes)}: its names are not used"
            )
        return classes, {LOST_LABEL: 0, **numbers}  # the number of a lost label is never seen: its image is unreadable

    def _labels(self) -> set[int | str]:
        contents = {name: content for name, content in self.contents.items() if content.names}
        labelled = [name for name, content in contents.items() if content.labels]
        if len(labelled) == len(contents):
            return {label for content in contents.values() for label in content.labels} - {LOST_LABEL}
        if labelled:
            unlabelled = next(name for name in contents if name not in labelled)
            log.warning(
                f"data.root: no labels, because the {unlabelled} images have none, unlike the {labelled[0]} images"
            )
        return set()

    def digests(self) -> dict[Path, str]:
        paths = [path for content in self.contents.values() for path in content.tar_reader.paths]
        hashes = {
            path: self.manifest_shards[path.name].get("sha256") for path in paths if path.name in self.manifest_shards
        }
        return {path: digest for path, digest in hashes.items() if isinstance(digest, str) and path.is_file()}

    def _index_split(self, split_name: str, pattern: str | None, labels: bool) -> IndexedShards:
        paths = [] if pattern is None else find_shards(self.root, pattern, f"data.{split_name}", self.manifest_shards)
        tars, builder = TarReader(paths), SampleIndexBuilder(self.member_roles)
        inventory = MemberInventory(self.member_roles, f"the {split_name} shards")
        truncated, incomplete = [], []
        indices = load_indices(paths, self.index, self.manifest_shards)
        for shard, (path, index) in enumerate(zip(paths, indices, strict=True)):
            before = len(builder.names)
            for sample in iter_samples(path, index, self.member_roles, inventory):
                builder.add(tars, shard, sample, labels)
            if missing := self._count_missing(path, len(builder.names) - before):
                builder.add_missing(path.name, shard, missing)
                incomplete.append(f"{missing} in '{path.name}'")
            elif not index.intact:
                truncated.append(path)
        self._check_truncated(truncated, len(paths))
        self._check_missing(incomplete, builder.missing_count, len(builder.names), split_name)
        inventory.log_messages()
        return builder.build(tars, labels)

    def _log_other_tars(self, patterns: Mapping[str, str | None]) -> None:
        """Log how many shards of the folder no pattern names, and how many both name."""
        used = {name: {*content.tar_reader.paths} for name, content in self.contents.items()}
        tars = [path for path in self.root.glob("*.tar*") if path.suffix != INDEX_SUFFIX and path.name[0] != "."]
        options = " and ".join(f"data.{name}={pattern}" for name, pattern in patterns.items())
        if others := sorted({*tars} - set().union(*used.values())):
            log.info(
                f"data.root: {len(others)} of the {len(tars)} tar files in '{self.root}' are left out by {options}, "
                f"such as '{others[0].name}'"
            )
        if both := sorted(set.intersection(*used.values())):
            log.warning(f"data.validation: {len(both)} of its shards are trained on too, such as '{both[0].name}'")

    def _count_missing(self, path: Path, count: int) -> int:
        """Return how many images of the manifest a shard lacks; 0 if the manifest is outdated."""
        if not self.manifest_shards:
            return 0
        entry = self.manifest_shards.get(path.name)
        if entry is None or entry["images"] < count:
            problem = "does not list" if entry is None else f"lists {entry['images']} images, not {count}, of"
            log.warning(f"data.root: {MANIFEST_NAME} in '{self.root}' {problem} the shard '{path.name}'")
            return 0
        missing: int = entry["images"] - count
        return missing

    def _check_missing(self, incomplete: list[str], missing: int, count: int, split_name: str) -> None:
        if not incomplete:
            return
        problem = f"{missing} of the {count} {split_name} images in {MANIFEST_NAME} of '{self.root}' are missing: "
        problem += ", ".join(incomplete[:MAX_LISTED]) + (", and more" if len(incomplete) > MAX_LISTED else "")
        if missing > allowed_unreadable(self.max_unreadable, count):
            raise UserError(f"data.max_unreadable={self.max_unreadable:g}: {problem}")
        log.warning(f"data.root: {problem}; the next images take their places")

    def _check_truncated(self, truncated: list[Path], count: int) -> None:
        if len(truncated) > allowed_unreadable(self.max_unreadable, count):
            raise UserError(
                f"data.max_unreadable={self.max_unreadable:g}: {len(truncated)} of {count} shards are truncated or "
                f"damaged; the last is '{truncated[-1]}'"
            )
        for path in truncated:
            log.warning(f"data.root: the shard '{path}' is truncated or damaged; only its intact samples are used")

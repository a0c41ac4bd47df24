"""Shards at URLs, with image counts and class names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqf.data.tar.manifest import class_names, listed_shards
from vqf.data.tar.patterns import find_urls
from vqf.data.tar.remote_io import check_url, is_url, read_remote_manifest, redact_url
from vqf.errors import EmptySplitError, UserError
from vqf.terminal import log


@dataclass(frozen=True)
class StreamedShards:
    """The shards of one split."""

    urls: list[str]
    length: int  # number of images
    hashes: tuple[object, ...] = ()  # sha256 per shard, from the manifest, or None


class RemoteShards:
    """The shards of both splits, with their manifest if there is one.

    Args:
        lengths: Number of images of each split; by default from the manifest.
        classes: Number of classes, 0 for no labels; by default from the manifest.

    Raises:
        UserError: If shards cannot be found, or their number of images is unknown.
    """

    def __init__(
        self,
        root: str | None,
        patterns: Mapping[str, str | None],
        lengths: Mapping[str, int | None],
        classes: int | None,
    ) -> None:
        self.manifest: Mapping[str, Any] = {}
        if root is not None and is_url(root):
            check_url(root, "data.root")
            self.manifest = read_remote_manifest(root)
        self.root, self.manifest_shards = root, listed_shards(self.manifest)
        self.shards_by_split = {
            name: self._find_shards(name, pattern, lengths[name]) for name, pattern in patterns.items()
        }
        if not any(shards.urls for shards in self.shards_by_split.values()):
            options = " and ".join(f"data.{name}={pattern}" for name, pattern in patterns.items())
            raise UserError(f"data.root: no shards at '{redact_url(root or '')}'; {options}")
        self.classes = _class_names(class_names(self.manifest), classes)

    def shards_of(self, split_name: str) -> StreamedShards:
        """Return the shards of a split.

        Raises:
            EmptySplitError: If there are none.
        """
        if not self.shards_by_split[split_name].urls:
            raise EmptySplitError(f"data.{split_name}: no {split_name} shards are named or listed")
        return self.shards_by_split[split_name]

    def _find_shards(self, split_name: str, pattern: str | None, length: int | None) -> StreamedShards:
        option = f"data.{split_name}"
        urls = [] if pattern is None else find_urls(self.root, pattern, option, sorted(self.manifest_shards))
        if not urls:
            return StreamedShards([], 0)
        folder = f"{(self.root or '').rstrip('/')}/"
        entries = [self.manifest_shards.get(url.removeprefix(folder)) for url in urls]
        if length is None and None in entries:
            raise UserError(
                f"{option}={pattern}: streamed shards do not say how many images they hold; give "
                f"{option}_images=..., or put the manifest.json of pipeline=shard beside them"
            )
        hashes = tuple(entry and entry.get("sha256") for entry in entries)
        count = sum(entry["images"] for entry in entries if entry) if length is None else length
        return StreamedShards(urls, count, hashes)


def _class_names(listed: Sequence[str], count: int | None) -> list[str]:
    if count is None or (count and len(listed) >= count):
        names = list(listed)
    else:
        names = [str(i) for i in range(count)]
    if not names and count is None:
        log.info("data.classes: not given, so the streamed images have no labels")
    return names

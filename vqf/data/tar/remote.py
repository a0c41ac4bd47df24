"""What is known of shards at addresses before they are read: which there are, how many images, which classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from vqf.data.tar.manifest import class_names, listed_shards
from vqf.data.tar.patterns import find_urls
from vqf.data.tar.remote_io import check_url, is_url, read_remote_manifest, redact_url
from vqf.data.tar.streaming import StreamedShards
from vqf.errors import EmptySplitError, UserError
from vqf.terminal import log


class RemoteShards:
    """The shards of both parts, with what the manifest beside them says, if there is one.

    Args:
        root: The address, or the folder, that names are below.
        patterns: Of the shards of each part.
        lengths: How many images each part has; by default what the manifest says.
        classes: How many there are, 0 for no labels; by default what the manifest says.

    Raises:
        UserError: If shards cannot be named, or nobody says how many images they hold.
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
            part: self._find_shards(part, pattern, lengths[part]) for part, pattern in patterns.items()
        }
        if not any(stream.urls for stream in self.shards_by_split.values()):
            named = " and ".join(f"data.{part}={pattern}" for part, pattern in patterns.items())
            raise UserError(f"data.root: no shards at '{redact_url(root or '')}'; {named}")
        self.classes = _class_names(class_names(self.manifest), classes)

    def shards_of(self, part: str) -> StreamedShards:
        """Return the shards of a part.

        Raises:
            EmptyPartError: If there are none.
        """
        if not self.shards_by_split[part].urls:
            raise EmptySplitError(f"data.{part}: no {part} shards are named or listed")
        return self.shards_by_split[part]

    def _find_shards(self, part: str, pattern: str | None, length: int | None) -> StreamedShards:
        option = f"data.{part}"
        urls = [] if pattern is None else find_urls(self.root, pattern, option, sorted(self.manifest_shards))
        if not urls:
            return StreamedShards([], 0)
        below = f"{(self.root or '').rstrip('/')}/"
        found = [self.manifest_shards.get(url.removeprefix(below)) for url in urls]
        if length is None and None in found:
            raise UserError(
                f"{option}={pattern}: streamed shards do not say how many images they hold; give "
                f"{option}_images=..., or put the manifest.json of pipeline=shard beside them"
            )
        known = tuple(each and each.get("sha256") for each in found)
        counted = sum(each["images"] for each in found if each) if length is None else length
        return StreamedShards(urls, counted, known)


def _class_names(listed: Sequence[str], count: int | None) -> list[str]:
    """Return the names of the classes: those that are listed, if they are enough."""
    if count is None or (count and len(listed) >= count):
        names = list(listed)
    else:
        names = [str(i) for i in range(count)]
    if not names and count is None:
        log.info("data.classes: not given, so the streamed images have no labels")
    return names

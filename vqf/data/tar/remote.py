"""What is known of shards at addresses before they are read: which there are, how many pictures, which classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from vqf.data.tar.manifest import class_names, listed_shards
from vqf.data.tar.patterns import find_addresses
from vqf.data.tar.remote_io import check_address, is_address, read_manifest, shown
from vqf.data.tar.streaming import Stream
from vqf.errors import EmptyPartError, UserError
from vqf.terminal import log


class Remote:
    """The shards of both parts, with what the manifest beside them says, if there is one.

    Args:
        root: The address, or the folder, that names are below.
        patterns: Of the shards of each part.
        lengths: How many pictures each part has; by default what the manifest says.
        classes: How many there are, 0 for no labels; by default what the manifest says.

    Raises:
        UserError: If shards cannot be named, or nobody says how many pictures they hold.
    """

    def __init__(
        self,
        root: str | None,
        patterns: Mapping[str, str | None],
        lengths: Mapping[str, int | None],
        classes: int | None,
    ) -> None:
        self.manifest: Mapping[str, Any] = {}
        if root is not None and is_address(root):
            check_address(root, "data.root")
            self.manifest = read_manifest(root)
        self.root, self.listed = root, listed_shards(self.manifest)
        self.streams = {part: self._stream(part, pattern, lengths[part]) for part, pattern in patterns.items()}
        if not any(stream.urls for stream in self.streams.values()):
            named = " and ".join(f"data.{part}={pattern}" for part, pattern in patterns.items())
            raise UserError(f"data.root: no shards at '{shown(root or '')}'; {named}")
        self.classes = _names(class_names(self.manifest), classes)

    def stream(self, part: str) -> Stream:
        """Return the shards of a part.

        Raises:
            EmptyPartError: If there are none.
        """
        if not self.streams[part].urls:
            raise EmptyPartError(f"data.{part}: no {part} shards are named or listed")
        return self.streams[part]

    def _stream(self, part: str, pattern: str | None, length: int | None) -> Stream:
        option = f"data.{part}"
        urls = [] if pattern is None else find_addresses(self.root, pattern, option, sorted(self.listed))
        if not urls:
            return Stream([], 0)
        below = f"{(self.root or '').rstrip('/')}/"
        found = [self.listed.get(url.removeprefix(below)) for url in urls]
        if length is None and None in found:
            raise UserError(
                f"{option}={pattern}: streamed shards do not say how many pictures they hold; give "
                f"{option}_pictures=..., or put the manifest.json of pipeline=shard beside them"
            )
        known = tuple(each and each.get("sha256") for each in found)
        counted = sum(each["pictures"] for each in found if each) if length is None else length
        return Stream(urls, counted, known)


def _names(listed: Sequence[str], count: int | None) -> list[str]:
    """Return the names of the classes: those that are listed, if they are enough."""
    if count is None or (count and len(listed) >= count):
        names = list(listed)
    else:
        names = [str(i) for i in range(count)]
    if not names and count is None:
        log.info("data.classes: not given, so the streamed pictures have no labels")
    return names

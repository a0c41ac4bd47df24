"""What could not be read while shards were written: how much of it may be, and what is said of it."""

from collections.abc import Iterator, Mapping, Sequence

from vqf.errors import UserError, quoted
from vqf.pipelines.files import Streams, place_of, sources_of
from vqf.pipelines.shard_manifest import LeftOut, Manifest, Written
from vqf.protocols import Split
from vqf.terminal import log

NAMED = 10  # pictures that the log names; the manifest names all


class Losses:
    """The pictures that are left out, and the shards of a stream that broke off, as a manifest says."""

    def __init__(self, manifest: Manifest, parts: Mapping[str, Split]) -> None:
        self.manifest, self.parts = manifest, parts

    def check(self) -> None:
        """Stop if too much of a source cannot be read, or all of it; what is written stays.

        Raises:
            UserError: If so.
        """
        for part, split in self.parts.items():
            for source, lost in self._by_source(part):
                said = [f"{quoted(each.name)} ({each.why})" for each in lost]
                tolerated = min(getattr(source, "tolerance", len(source)), len(source) - 1)
                self._check(f"{len(source)} {part} pictures", said, tolerated)
            if isinstance(split, Streams):
                broken = [f"'{self._address(each)}' ({each.broken})" for each in self._broken(part)]
                self._check(f"{len(split.urls)} {part} shards", broken, split.shard_tolerance)

    def check_nothing(self) -> None:
        """Stop if all is done and nothing of a part could be read.

        Raises:
            UserError: If so.
        """
        for part in self.parts:
            if not any(each.pictures for each in self._shards(part)):
                first = next((f": '{self._address(each)}' ({each.broken})" for each in self._broken(part)), "")
                raise UserError(f"data.{part}: none of its pictures can be read{first}")

    def tell(self) -> None:
        """Log what is missing."""
        lost = [each for part in self.parts for each in self._left_out(part)]
        for picture in lost[:NAMED]:
            log.warning("left out: %s (%s)", quoted(picture.name), picture.why)
        for part, split in self.parts.items():
            for shard in self._broken(part):
                what = f"'{shard.name}' is what could be read of '{self._address(shard)}' ({shard.broken})"
                log.warning("%s; the same command fetches it again", what)
            held = sum(each.pictures + len(each.left_out) for each in self._shards(part))
            if isinstance(split, Streams) and held != len(split):
                log.warning("data.%s_pictures=%d: its shards hold %d", part, len(split), held)
        shards = self.manifest.shards.values()
        count = sum(each.pictures for each in shards)
        log.info("%d pictures in %d shards, %d left out: %s", count, len(shards), len(lost), self.manifest.folder)

    def _check(self, of: str, lost: Sequence[str], tolerated: int) -> None:
        if len(lost) > tolerated:
            raise UserError(
                f"data.max_bad: {len(lost)} of the {of} cannot be read, where {tolerated} may be left out; the last is "
                f"{lost[-1]}, '{self.manifest.path}' names all. What is written stays, and the same command with a "
                "larger max_bad goes on"
            )

    def _shards(self, part: str) -> Iterator[Written]:
        return (each for each in self.manifest.shards.values() if each.part == part)

    def _broken(self, part: str) -> Iterator[Written]:
        return (each for each in self._shards(part) if each.broken)

    def _left_out(self, part: str) -> list[LeftOut]:
        return [lost for each in self._shards(part) for lost in each.left_out]

    def _by_source(self, part: str) -> Iterator[tuple[Split, list[LeftOut]]]:
        split, lost = self.parts[part], self._left_out(part)
        if isinstance(split, Streams):
            yield split, lost
            return
        found = [place_of(split, int(each.key)).split for each in lost]
        for source in sources_of(split) if lost else ():
            yield source, [each for each, own in zip(lost, found, strict=True) if own is source]

    def _address(self, written: Written) -> str:
        split = self.parts[written.part]
        assert isinstance(split, Streams), "nothing else breaks off"
        return split.address(int(written.name.removesuffix(".tar").rpartition("-")[2]))

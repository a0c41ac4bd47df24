"""What could not be read while shards were written: how much of it may be, and what is said of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vqf.dataloading.image_files import Streams, place_of, sources_of
from vqf.errors import UserError, quoted
from vqf.pipelines.shards.manifest import LeftOut, Manifest, Written
from vqf.protocols import Split
from vqf.terminal import log

NAMED = 10  # pictures that the log names; the manifest names all


@dataclass
class Tally:
    """How much of something is lost."""

    option: str  # whose `max_bad` it is
    what: str
    count: int
    tolerated: int
    lost: int = 0
    last: str = ""

    def add(self, last: str) -> None:
        self.lost, self.last = self.lost + 1, last


class Losses:
    """The pictures that are left out, and the shards of a stream that broke off.

    Args:
        manifest: What is said to be known of.
        parts: What the shards are made of.
    """

    def __init__(self, manifest: Manifest, parts: Mapping[str, Split]) -> None:
        self.manifest, self.parts = manifest, parts
        self.pictures = {
            (part, id(source)): Tally(
                option, f"{part} pictures", len(source), getattr(source, "tolerance", len(source))
            )
            for part, split in parts.items()
            for option, source in sources_of(split)
        }
        self.shards = {
            part: Tally("data", f"{part} shards", len(split.urls), split.shard_tolerance)
            for part, split in parts.items()
            if isinstance(split, Streams)
        }
        for each in manifest.shards.values():
            self.count(each)

    def count(self, written: Written) -> None:
        """Count what is missing in a shard."""
        split = self.parts[written.part]
        for lost in written.left_out:
            source = split if isinstance(split, Streams) else place_of(split, int(lost.key)).split
            self.pictures[written.part, id(source)].add(f"{quoted(lost.name)} ({lost.why})")
        if written.broken:
            self.shards[written.part].add(f"'{self._address(written)}' ({written.broken})")

    def check(self) -> None:
        """Stop if too much of a source cannot be read, or all of it; what is written stays.

        Raises:
            UserError: If so.
        """
        for each in self.pictures.values():
            if each.lost and each.lost == each.count:
                raise UserError(
                    f"{each.option}: none of its {each.count} {each.what} can be read; the last is {each.last}"
                )
        for each in (*self.pictures.values(), *self.shards.values()):
            if each.lost > each.tolerated:
                raise UserError(
                    f"{each.option}.max_bad: {each.lost} of the {each.count} {each.what} cannot be read, where "
                    f"{each.tolerated} may be left out; the last is {each.last}, '{self.manifest.path}' names all. "
                    "What is written stays, and the same command with a larger max_bad goes on"
                )

    def check_nothing(self) -> None:
        """Stop if all is done and nothing of a part could be read.

        Raises:
            UserError: If so.
        """
        for part in self.parts:
            if not any(each.pictures for each in self._shards(part)):
                broken = self.shards.get(part)
                last = f"; the last shard is {broken.last}" if broken and broken.lost else ""
                raise UserError(f"data.{part}: none of its pictures can be read{last}")

    def too_many(self, part: str) -> bool:
        """Say whether so many pictures of a stream are left out that it would have to stop."""
        return any(each.lost > each.tolerated for (of, _), each in self.pictures.items() if of == part)

    def tell(self) -> None:
        """Log what is missing."""
        lost = [each for part in self.parts for each in self._left_out(part)]
        for picture in lost[:NAMED]:
            log.warning("left out: %s (%s)", quoted(picture.name), picture.why)
        for part, split in self.parts.items():
            for shard in (each for each in self._shards(part) if each.broken):
                what = f"'{shard.name}' is what could be read of '{self._address(shard)}' ({shard.broken})"
                log.warning("%s; the same command fetches it again", what)
            held = sum(each.pictures + len(each.left_out) for each in self._shards(part))
            if isinstance(split, Streams) and held != len(split):
                log.warning("data.%s_pictures=%d: its shards hold %d", part, len(split), held)
        shards = self.manifest.shards.values()
        count = sum(each.pictures for each in shards)
        log.info("%d pictures in %d shards, %d left out: %s", count, len(shards), len(lost), self.manifest.folder)

    def _shards(self, part: str) -> Iterator[Written]:
        return (each for each in self.manifest.shards.values() if each.part == part)

    def _left_out(self, part: str) -> list[LeftOut]:
        return [lost for each in self._shards(part) for lost in each.left_out]

    def _address(self, written: Written) -> str:
        split = self.parts[written.part]
        assert isinstance(split, Streams), "nothing else breaks off"
        return split.address(int(written.name.removesuffix(".tar").rpartition("-")[2]))

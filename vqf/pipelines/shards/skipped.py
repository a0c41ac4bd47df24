"""What could not be read while shards were written: how much of it may be, and what is said of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vqf.dataloading.image_files import StreamedShardSplit, flatten_sources, locate
from vqf.errors import UserError, quote_name
from vqf.pipelines.shards.manifest import ShardManifest, ShardRecord, SkippedSample
from vqf.protocols import Split
from vqf.terminal import log

MAX_LISTED = 10  # images that the log names; the manifest names all


@dataclass
class SkipCounter:
    """How much of something is lost."""

    option: str  # whose `max_unreadable` it is
    noun: str
    total: int
    limit: int
    skipped: int = 0
    last_message: str = ""

    def add(self, last: str) -> None:
        self.skipped, self.last_message = self.skipped + 1, last


class SkippedSamples:
    """The images that are left out, and the shards of a stream that broke off.

    Args:
        manifest: What is said to be known of.
        parts: What the shards are made of.
    """

    def __init__(self, manifest: ShardManifest, parts: Mapping[str, Split]) -> None:
        self.manifest, self.splits = manifest, parts
        self.image_counters = {
            (part, id(source)): SkipCounter(
                option, f"{part} images", len(source), getattr(source, "unreadable_limit", len(source))
            )
            for part, split in parts.items()
            for option, source in flatten_sources(split)
        }
        self.shard_counters = {
            part: SkipCounter("data", f"{part} shards", len(split.urls), split.broken_shard_limit)
            for part, split in parts.items()
            if isinstance(split, StreamedShardSplit)
        }
        for each in manifest.shards.values():
            self.add_record(each)

    def add_record(self, written: ShardRecord) -> None:
        """Count what is missing in a shard."""
        split = self.splits[written.split_name]
        for lost in written.skipped:
            source = split if isinstance(split, StreamedShardSplit) else locate(split, int(lost.key)).split
            self.image_counters[written.split_name, id(source)].add(f"{quote_name(lost.name)} ({lost.reason})")
        if written.broken:
            self.shard_counters[written.split_name].add(f"'{self._source_url(written)}' ({written.broken})")

    def check(self) -> None:
        """Stop if too much of a source cannot be read, or all of it; what is written stays.

        Raises:
            UserError: If so.
        """
        for each in self.image_counters.values():
            if each.skipped and each.skipped == each.total:
                raise UserError(
                    f"{each.option}: none of its {each.total} {each.noun} can be read; the last is {each.last_message}"
                )
        for each in (*self.image_counters.values(), *self.shard_counters.values()):
            if each.skipped > each.limit:
                raise UserError(
                    f"{each.option}.max_unreadable: {each.skipped} of the {each.total} {each.noun} cannot be "
                    f"read, where "
                    f"{each.limit} may be left out; the last is {each.last_message}, '{self.manifest.path}' names all. "
                    "What is written stays, and the same command with a larger max_unreadable goes on"
                )

    def check_not_empty(self) -> None:
        """Stop if all is done and nothing of a part could be read.

        Raises:
            UserError: If so.
        """
        for part in self.splits:
            if not any(each.images for each in self._records(part)):
                broken = self.shard_counters.get(part)
                last = f"; the last shard is {broken.last_message}" if broken and broken.skipped else ""
                raise UserError(f"data.{part}: none of its images can be read{last}")

    def exceeds_limit(self, part: str) -> bool:
        """Say whether so many images of a stream are left out that it would have to stop."""
        return any(each.skipped > each.limit for (of, _), each in self.image_counters.items() if of == part)

    def log_summary(self) -> None:
        """Log what is missing."""
        lost = [each for part in self.splits for each in self._skipped(part)]
        for image in lost[:MAX_LISTED]:
            log.warning("left out: %s (%s)", quote_name(image.name), image.reason)
        for part, split in self.splits.items():
            for shard in (each for each in self._records(part) if each.broken):
                what = f"'{shard.name}' is what could be read of '{self._source_url(shard)}' ({shard.broken})"
                log.warning("%s; the same command fetches it again", what)
            held = sum(each.images + len(each.skipped) for each in self._records(part))
            if isinstance(split, StreamedShardSplit) and held != len(split):
                log.warning("data.%s_images=%d: its shards hold %d", part, len(split), held)
        shards = self.manifest.shards.values()
        count = sum(each.images for each in shards)
        log.info("%d images in %d shards, %d left out: %s", count, len(shards), len(lost), self.manifest.folder)

    def _records(self, part: str) -> Iterator[ShardRecord]:
        return (each for each in self.manifest.shards.values() if each.split_name == part)

    def _skipped(self, part: str) -> list[SkippedSample]:
        return [lost for each in self._records(part) for lost in each.skipped]

    def _source_url(self, written: ShardRecord) -> str:
        split = self.splits[written.split_name]
        assert isinstance(split, StreamedShardSplit), "nothing else breaks off"
        return split.display_url(int(written.name.removesuffix(".tar").rpartition("-")[2]))

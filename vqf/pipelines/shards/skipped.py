"""Count what could not be read, and stop if it is too much."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vqf.dataloading.image_files import StreamedShardSplit, flatten_sources, locate
from vqf.errors import UserError, quote_name
from vqf.pipelines.shards.manifest import ShardManifest, ShardRecord
from vqf.protocols import LimitsUnreadable, Split
from vqf.terminal import log

MAX_LISTED = 10  # skipped images that the log names; the manifest names all


@dataclass
class SkipCounter:
    """Counts the unreadable images, or shards, of one data source."""

    option: str  # config key of the source, which has the option `max_unreadable`
    noun: str
    total: int
    limit: int
    skipped: int = 0
    last_message: str = ""

    def add(self, message: str) -> None:
        self.skipped, self.last_message = self.skipped + 1, message


class SkippedSamples:
    """Counts skipped images, and streamed shards that broke off, by data source."""

    def __init__(self, manifest: ShardManifest, splits: Mapping[str, Split]) -> None:
        self.manifest, self.splits = manifest, splits
        self.image_counters = {
            (name, id(source)): SkipCounter(option, f"{name} images", len(source), _limit(source))
            for name, split in splits.items()
            for option, source in flatten_sources(split)
        }
        self.shard_counters = {
            name: SkipCounter("data", f"{name} shards", len(split.urls), split.broken_shard_limit)
            for name, split in splits.items()
            if isinstance(split, StreamedShardSplit)
        }
        for record in manifest.shards.values():
            self.add_record(record)

    def add_record(self, record: ShardRecord) -> None:
        split = self.splits[record.split_name]
        for sample in record.skipped:
            source = split if isinstance(split, StreamedShardSplit) else locate(split, int(sample.key)).split
            self.image_counters[record.split_name, id(source)].add(f"{quote_name(sample.name)} ({sample.reason})")
        if record.broken:
            self.shard_counters[record.split_name].add(f"'{self._source_url(record)}' ({record.broken})")

    def check(self) -> None:
        """Check the limits.

        Raises:
            UserError: If no image of a source can be read, or too many cannot.
        """
        for counter in self.image_counters.values():
            if counter.skipped and counter.skipped == counter.total:
                raise UserError(
                    f"{counter.option}: none of its {counter.total} {counter.noun} can be read; the last is "
                    f"{counter.last_message}"
                )
        for counter in (*self.image_counters.values(), *self.shard_counters.values()):
            if counter.skipped > counter.limit:
                raise UserError(
                    f"{counter.option}.max_unreadable: {counter.skipped} of the {counter.total} {counter.noun} cannot "
                    f"be read, more than the {counter.limit} allowed; the last is {counter.last_message}, "
                    f"'{self.manifest.path}' lists all. Finished shards are kept: run the same command with a larger "
                    "max_unreadable to continue"
                )

    def check_not_empty(self) -> None:
        """Check the finished splits.

        Raises:
            UserError: If a split has no image.
        """
        for name in self.splits:
            if not any(record.images for record in self._records(name)):
                broken = self.shard_counters.get(name)
                last = f"; the last shard is {broken.last_message}" if broken and broken.skipped else ""
                raise UserError(f"data.{name}: none of its images can be read{last}")

    def exceeds_limit(self, split_name: str) -> bool:
        return any(
            counter.skipped > counter.limit for (name, _), counter in self.image_counters.items() if name == split_name
        )

    def log_summary(self) -> None:
        skipped = [sample for name in self.splits for record in self._records(name) for sample in record.skipped]
        for sample in skipped[:MAX_LISTED]:
            log.warning("skipped: %s (%s)", quote_name(sample.name), sample.reason)
        for name, split in self.splits.items():
            self._log_incomplete(name, split)
        shards = self.manifest.shards.values()
        count = sum(record.images for record in shards)
        log.info("%d images in %d shards, %d skipped: %s", count, len(shards), len(skipped), self.manifest.folder)

    def _log_incomplete(self, name: str, split: Split) -> None:
        for record in (record for record in self._records(name) if record.broken):
            log.warning(
                "'%s' is incomplete: cannot read all of '%s' (%s); the same command fetches it again",
                record.name,
                self._source_url(record),
                record.broken,
            )
        total = sum(record.images + len(record.skipped) for record in self._records(name))
        if isinstance(split, StreamedShardSplit) and total != len(split):
            log.warning("data.%s_images=%d: its shards hold %d", name, len(split), total)

    def _records(self, split_name: str) -> Iterator[ShardRecord]:
        return (record for record in self.manifest.shards.values() if record.split_name == split_name)

    def _source_url(self, record: ShardRecord) -> str:
        split = self.splits[record.split_name]
        assert isinstance(split, StreamedShardSplit), "only streamed shards can break off"
        return split.display_url(int(record.name.removesuffix(".tar").rpartition("-")[2]))


def _limit(source: Split) -> int:
    return source.unreadable_limit if isinstance(source, LimitsUnreadable) else len(source)

"""Requeue shards whose skipped images can be read by now."""

from functools import partial

from vqf.dataloading.image_files import StreamedShardSplit
from vqf.dataloading.worker_pool import process_map
from vqf.pipelines.shards.manifest import ShardManifest, ShardRecord
from vqf.pipelines.shards.skipped import SkippedSamples
from vqf.pipelines.shards.writer import ShardWriter
from vqf.terminal import log, progress

SkippedRef = tuple[str, str, str]  # shard, split and key of a skipped image


def mark_for_rewrite(manifest: ShardManifest, writer: ShardWriter, workers: int) -> None:
    """Requeue the finished shards that may become more complete.

    Streamed shards, which must be fetched again, only if they broke off or exceed the limit.
    """
    streamed = {name for name, split in writer.splits.items() if isinstance(split, StreamedShardSplit)}
    _drop_inconsistent(manifest, writer, streamed)
    _retry_skipped(manifest, writer, streamed, workers)
    skipped = SkippedSamples(manifest, writer.splits)
    for record in [*manifest.shards.values()]:
        over_limit = record.split_name in streamed and skipped.exceeds_limit(record.split_name)
        if record.broken or (record.skipped and over_limit):
            manifest.requeue(record.name)
    for name in manifest.requeued:
        log.info("'%s' is written again: it lacks images", name)


def _drop_inconsistent(manifest: ShardManifest, writer: ShardWriter, streamed: set[str]) -> None:
    for record in _file_backed_shards(manifest, streamed):
        if not all(writer.has(record.split_name, sample.key) for sample in record.skipped):
            del manifest.shards[record.name]


def _retry_skipped(manifest: ShardManifest, writer: ShardWriter, streamed: set[str], workers: int) -> None:
    refs = [
        (record.name, record.split_name, sample.key)
        for record in _file_backed_shards(manifest, streamed)
        for sample in record.skipped
    ]
    with progress("retry", len(refs)) as bar:
        for name, readable in process_map(partial(_is_readable_now, writer), refs, workers):
            if readable:
                manifest.requeue(name)
            bar.advance()


def _file_backed_shards(manifest: ShardManifest, streamed: set[str]) -> list[ShardRecord]:
    return [record for record in manifest.shards.values() if record.split_name not in streamed]


def _is_readable_now(writer: ShardWriter, ref: SkippedRef) -> tuple[str, bool]:
    name, split_name, key = ref
    return name, writer.can_read(split_name, key)

"""What an earlier run could not read, and may be there by now: a disk, or a server, was away for a moment."""

from functools import partial

from vqf.dataloading.image_files import StreamedShardSplit
from vqf.dataloading.worker_pool import process_map
from vqf.pipelines.shards.manifest import ShardManifest, ShardRecord
from vqf.pipelines.shards.skipped import SkippedSamples
from vqf.pipelines.shards.writer import ShardWriter
from vqf.terminal import log, progress

SkippedRef = tuple[str, str, str]  # a shard, its part, and the key of an image that is not in it


def mark_for_rewrite(manifest: ShardManifest, writer: ShardWriter, workers: int) -> None:
    """Doubt the shards to which something may be added: they are written again.

    An image of a stream comes with all of its shard alone: only what would stop the run is fetched again.
    """
    streamed = {part for part, split in writer.splits.items() if isinstance(split, StreamedShardSplit)}
    _drop_inconsistent(manifest, writer, streamed)
    _retry_skipped(manifest, writer, streamed, workers)
    losses = SkippedSamples(manifest, writer.splits)
    for each in [*manifest.shards.values()]:
        if each.broken or (each.skipped and each.split_name in streamed and losses.exceeds_limit(each.split_name)):
            manifest.requeue(each.name)
    for name in manifest.requeued:
        log.info("'%s' is written again: something was missing from it", name)


def _drop_inconsistent(manifest: ShardManifest, writer: ShardWriter, streamed: set[str]) -> None:
    """Forget shards of which somebody has written that images are missing that never were."""
    for each in _file_backed_shards(manifest, streamed):
        if not all(writer.has(each.split_name, lost.key) for lost in each.skipped):
            del manifest.shards[each.name]


def _retry_skipped(manifest: ShardManifest, writer: ShardWriter, streamed: set[str], workers: int) -> None:
    looks = [
        (each.name, each.split_name, lost.key)
        for each in _file_backed_shards(manifest, streamed)
        for lost in each.skipped
    ]
    with progress("look again", len(looks)) as bar:
        for name, readable in process_map(partial(_is_readable_now, writer), looks, workers):
            if readable:
                manifest.requeue(name)
            bar.advance()


def _file_backed_shards(manifest: ShardManifest, streamed: set[str]) -> list[ShardRecord]:
    return [each for each in manifest.shards.values() if each.split_name not in streamed]


def _is_readable_now(writer: ShardWriter, at: SkippedRef) -> tuple[str, bool]:
    name, part, key = at
    return name, writer.can_read(part, key)

"""What an earlier run could not read, and may be there by now: a disk, or a server, was away for a moment."""

from functools import partial

from vqf.dataloading.image_files import Streams, spread
from vqf.pipelines.shards.manifest import Manifest, Written
from vqf.pipelines.shards.skipped import Losses
from vqf.pipelines.shards.writer import Writer
from vqf.terminal import log, progress

Look = tuple[str, str, str]  # a shard, its part, and the key of a picture that is not in it


def doubt(manifest: Manifest, writer: Writer, workers: int) -> None:
    """Doubt the shards to which something may be added: they are written again.

    A picture of a stream comes with all of its shard alone: only what would stop the run is fetched again.
    """
    streamed = {part for part, split in writer.parts.items() if isinstance(split, Streams)}
    _forget_edited(manifest, writer, streamed)
    _look_again(manifest, writer, streamed, workers)
    losses = Losses(manifest, writer.parts)
    for each in [*manifest.shards.values()]:
        if each.broken or (each.left_out and each.part in streamed and losses.too_many(each.part)):
            manifest.doubt(each.name)
    for name in manifest.doubtful:
        log.info("'%s' is written again: something was missing from it", name)


def _forget_edited(manifest: Manifest, writer: Writer, streamed: set[str]) -> None:
    """Forget shards of which somebody has written that pictures are missing that never were."""
    for each in _of_files(manifest, streamed):
        if not all(writer.has(each.part, lost.key) for lost in each.left_out):
            del manifest.shards[each.name]


def _look_again(manifest: Manifest, writer: Writer, streamed: set[str], workers: int) -> None:
    looks = [(each.name, each.part, lost.key) for each in _of_files(manifest, streamed) for lost in each.left_out]
    with progress("look again", len(looks)) as bar:
        for name, readable in spread(partial(_look, writer), looks, workers):
            if readable:
                manifest.doubt(name)
            bar.advance()


def _of_files(manifest: Manifest, streamed: set[str]) -> list[Written]:
    return [each for each in manifest.shards.values() if each.part not in streamed]


def _look(writer: Writer, at: Look) -> tuple[str, bool]:
    name, part, key = at
    return name, writer.can_read(part, key)

"""Any data source into tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vqf.dataloading.image_files import ImageFileSplit, StreamedShardSplit
from vqf.dataloading.splits import open_splits
from vqf.dataloading.worker_pool import process_map
from vqf.errors import UserError
from vqf.pipelines.shards.manifest import ShardManifest
from vqf.pipelines.shards.maps import map_options
from vqf.pipelines.shards.retry import mark_for_rewrite
from vqf.pipelines.shards.skipped import SkippedSamples
from vqf.pipelines.shards.writer import ImageFormat, ShardTask, ShardWriter
from vqf.protocols import Data, Split
from vqf.registry import register
from vqf.runs.lock import folder_lock, unwritable_message
from vqf.seeding import seeded_generator
from vqf.terminal import log, progress


@register("pipeline", "shard")
class Shard:
    """Write the images of `data` into tar shards that `data=shards` and webdataset read, with a manifest.

    An image `00000012.jpg` has its label beside it as `.cls`, its name as `.json`, and its map, if the source has
    maps, as `.condition.png`: `data=shard_pairs` reads both. Images that cannot be read are left out and named in the
    manifest, up to `data.max_unreadable`. Shards that an earlier run finished are kept; a run that is killed leaves
    none half-written. `workers` is how many are written at a time.

    Of shards that are streamed each becomes one, its images in their order.

    Args:
        out: The folder of the shards; `shards/` of the run's folder by default.
        format: Of the images. "original" copies the files of a source that has them, byte by byte; the others
            store the whole image, upright and in RGB, and maps as PNG. A source without files gives what it shows in
            epoch 0.
        size: What a shorter side that is longer is scaled down to, of images and of maps.
        shard_size: Images of a shard.
        quality: Of jpg and webp.
        images_only: Leave out the maps of a source that has some.
        shuffle: Put training images in an order that the seed decides, for readers that read shards from end to end.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        out: str | None = None,
        format: ImageFormat = "original",
        size: int | None = None,
        shard_size: int = 5000,
        quality: int = 95,
        images_only: bool = False,
        shuffle: bool = True,
    ) -> None:
        if shard_size < 1 or (size is not None and size < 1):
            raise ValueError(f"size={size} and shard_size={shard_size}: both are numbers of at least 1")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality={quality} is not in [1, 100]")
        if size is not None and format == "original":
            raise ValueError(f"size={size}: a copied file keeps its size; give format=jpg, png or webp")
        if out == "":
            raise ValueError("out is empty; name a folder, or leave it out")
        self.config, self.format, self.size, self.quality = config, format, size, quality
        self.shard_size, self.shuffle, self.images_only = shard_size, shuffle, images_only
        self.folder = run_dir / "shards" if out is None else Path(out).expanduser()

    def run(self) -> None:
        """Write `<part>-000000.tar` and so on, and `manifest.json`."""
        data, parts = open_splits(self.config)
        if self.format == "original" and not all(
            isinstance(split, ImageFileSplit | StreamedShardSplit) for split in parts.values()
        ):
            raise UserError(f"format=original: data '{self.config.data.name}' has no files to copy; give format=png")
        maps = None if self.images_only else map_options(self.config.data, parts.values(), self.format)
        tasks = [task for part, split in parts.items() for task in self._tasks(part, split)]
        made_of, names = self._provenance(data, parts, maps), {task.name for task in tasks}
        writer = ShardWriter(self.folder, parts, self.format, self.size, self.quality, maps)
        try:
            ShardManifest(self.folder, made_of, names)  # a folder of somebody else gets no lock
            with folder_lock(self.folder, "out"):
                self._write(ShardManifest(self.folder, made_of, names), tasks, writer)
        except OSError as error:
            raise UserError(unwritable_message(error, self.folder, "out")) from error

    def _provenance(self, data: Data, parts: Mapping[str, Split], maps: Mapping[str, Any] | None) -> dict[str, Any]:
        asked = {"format": self.format, "size": self.size, "shard_size": self.shard_size, "quality": self.quality}
        asked |= {"shuffle": self.shuffle, "seed": self.config.seed}
        sources = {part: split.fingerprint for part, split in parts.items()}
        return {"options": asked, "sources": sources, "classes": list(data.classes), "maps": maps}

    def _write(self, manifest: ShardManifest, tasks: list[ShardTask], writer: ShardWriter) -> None:
        manifest.start()
        mark_for_rewrite(manifest, writer, self.config.workers)
        losses = SkippedSamples(manifest, writer.splits)
        losses.check()
        left = [
            replace(task, previous=manifest.requeued.get(task.name))
            for task in tasks
            if task.name not in manifest.shards
        ]
        if kept := [*manifest.shards.values()]:
            log.info("%d of %d shards are there already", len(kept), len(tasks))
        done = sum(each.images + len(each.skipped) for each in kept)
        try:
            with progress("shard", sum(map(len, writer.splits.values())), done) as bar:
                for written in process_map(writer, left, self.config.workers):
                    manifest.add(written)
                    losses.add_record(written)
                    losses.check()
                    bar.advance(written.images + len(written.skipped))
            losses.check_not_empty()
        finally:
            if left:
                manifest.save()
        manifest.save(finished=True)
        losses.log_summary()

    def _tasks(self, part: str, split: Split) -> Iterator[ShardTask]:
        if isinstance(split, StreamedShardSplit):
            log.info("%s shards are streamed: each is copied to one, its images in their order", part)
            yield from (ShardTask(f"{part}-{number:06d}.tar", part, [], number) for number in range(len(split.urls)))
            return
        order = torch.arange(len(split))
        if self.shuffle and part == "train":
            order = torch.randperm(len(split), generator=seeded_generator("shards", self.config.seed))
        for number, indices in enumerate(order.split(min(self.shard_size, len(split)))):
            yield ShardTask(f"{part}-{number:06d}.tar", part, indices.tolist())

"""Write tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval
from omegaconf import DictConfig

from vqf.dataloading.image_files import ImageFileSplit, StreamedShardSplit
from vqf.dataloading.splits import open_splits
from vqf.dataloading.worker_pool import process_map
from vqf.errors import UserError
from vqf.options.ranges import PositiveInt
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
    """Write the images of `data` into tar shards with a manifest, for `data=shards` and webdataset.

    Beside `00000012.jpg` lie label (`.cls`), name (`.json`) and condition map (`.condition.png`). Up to
    `data.max_unreadable` images are skipped. Existing shards are kept. A streamed source keeps its shards and order.

    Args:
        out: Folder of the shards; by default `shards/` in the run's folder.
        format: Format of the images. "original" copies the files of a source byte by byte; the others store the
            uncropped image, upright and in RGB, and maps as PNG. A source without files gives its samples of epoch 0.
        size: Shorter sides above this are scaled down to it, of images and maps.
        shard_size: Images per shard.
        quality: Quality of jpg and webp.
        images_only: Leave the condition maps out.
        shuffle: Shuffle the training images by the seed, for readers that read shards sequentially.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        out: str | None = None,
        format: ImageFormat = "original",
        size: PositiveInt | None = None,
        shard_size: PositiveInt = 5000,
        quality: Annotated[int, Interval(ge=1, le=100)] = 95,
        images_only: bool = False,
        shuffle: bool = True,
    ) -> None:
        if size is not None and format == "original":
            raise ValueError(f"size={size}: a copied file keeps its size; give format=jpg, png or webp")
        if out == "":
            raise ValueError("out is empty; name a folder, or leave it out")
        self.config, self.format, self.size, self.quality = config, format, size, quality
        self.shard_size, self.shuffle, self.images_only = shard_size, shuffle, images_only
        self.folder = run_dir / "shards" if out is None else Path(out).expanduser()

    def run(self) -> None:
        data, splits = open_splits(self.config)
        if self.format == "original" and not all(
            isinstance(split, ImageFileSplit | StreamedShardSplit) for split in splits.values()
        ):
            raise UserError(f"format=original: data '{self.config.data.name}' has no files to copy; give format=png")
        if self.format == "original" and (pixel_range := self.config.data.get("range")):
            words = ",".join(f"{value:g}" for value in pixel_range)
            log.info("data.range: files are copied as they are; give data.range=[%s] to data=shards as well", words)
        maps = None if self.images_only else map_options(self.config.data, splits.values(), self.format)
        tasks = [task for name, split in splits.items() for task in self._tasks(name, split)]
        provenance, names = self._provenance(data, splits, maps), {task.name for task in tasks}
        writer = ShardWriter(self.folder, splits, self.format, self.size, self.quality, maps)
        try:
            ShardManifest(self.folder, provenance, names)  # refuses a foreign folder before the lock writes to it
            with folder_lock(self.folder, "out"):
                self._write(ShardManifest(self.folder, provenance, names), tasks, writer)
        except OSError as error:
            raise UserError(unwritable_message(error, self.folder, "out")) from error

    def _provenance(self, data: Data, splits: Mapping[str, Split], maps: Mapping[str, Any] | None) -> dict[str, Any]:
        options = {"format": self.format, "size": self.size, "shard_size": self.shard_size, "quality": self.quality}
        options |= {"shuffle": self.shuffle, "seed": self.config.seed}
        sources = {name: split.fingerprint for name, split in splits.items()}
        return {"options": options, "sources": sources, "classes": list(data.classes), "maps": maps}

    def _write(self, manifest: ShardManifest, tasks: list[ShardTask], writer: ShardWriter) -> None:
        manifest.start()
        mark_for_rewrite(manifest, writer, self.config.workers)
        skipped = SkippedSamples(manifest, writer.splits)
        skipped.check()
        remaining = [
            replace(task, previous=manifest.requeued.get(task.name))
            for task in tasks
            if task.name not in manifest.shards
        ]
        if finished := [*manifest.shards.values()]:
            log.info("%d of %d shards are there already", len(finished), len(tasks))
        done = sum(record.images + len(record.skipped) for record in finished)
        try:
            with progress("shard", sum(map(len, writer.splits.values())), done) as bar:
                for record in process_map(writer, remaining, self.config.workers):
                    manifest.add(record)
                    skipped.add_record(record)
                    skipped.check()
                    bar.advance(record.images + len(record.skipped))
            skipped.check_not_empty()
        finally:
            if remaining:
                manifest.save()
        manifest.save(finished=True)
        skipped.log_summary()

    def _tasks(self, split_name: str, split: Split) -> Iterator[ShardTask]:
        if isinstance(split, StreamedShardSplit):
            log.info("%s shards are streamed: shard_size and shuffle have no effect", split_name)
            for number in range(len(split.urls)):
                yield ShardTask(f"{split_name}-{number:06d}.tar", split_name, [], number)
            return
        order = torch.arange(len(split))
        if self.shuffle and split_name == "train":
            order = torch.randperm(len(split), generator=seeded_generator("shards", self.config.seed))
        for number, indices in enumerate(order.split(min(self.shard_size, len(split)))):
            yield ShardTask(f"{split_name}-{number:06d}.tar", split_name, indices.tolist())

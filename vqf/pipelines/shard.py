"""Any data source into tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vqf.dataloading.image_files import Files, Streams, open_parts, spread
from vqf.errors import UserError
from vqf.pipelines.shards.manifest import Manifest
from vqf.pipelines.shards.maps import options_of_maps
from vqf.pipelines.shards.retry import doubt
from vqf.pipelines.shards.skipped import Losses
from vqf.pipelines.shards.writer import Format, Task, Writer
from vqf.protocols import Data, Split
from vqf.registry import register
from vqf.runs.lock import held, unwritable
from vqf.seeding import generator
from vqf.terminal import log, progress


@register("pipeline", "shard")
class Shard:
    """Write the pictures of `data` into tar shards that `data=shards` and webdataset read, with a manifest.

    A picture `00000012.jpg` has its label beside it as `.cls`, its name as `.json`, and its map, if the source has
    maps, as `.condition.png`: `data=shard_pairs` reads both. Pictures that cannot be read are left out and named in the
    manifest, up to `data.max_bad`. Shards that an earlier run finished are kept; a run that is killed leaves none
    half-written. `workers` is how many are written at a time.

    Of shards that are streamed each becomes one, its pictures in their order.

    Args:
        to: The folder of the shards; `shards/` of the run's folder by default.
        format: Of the pictures. "original" copies the files of a source that has them, byte by byte; the others
            store the whole picture, upright and in RGB, and maps as PNG. A source without files gives what it shows in
            epoch 0.
        size: What a shorter side that is longer is scaled down to, of pictures and of maps.
        shard_size: Pictures of a shard.
        quality: Of jpg and webp.
        pictures_alone: Leave out the maps of a source that has some.
        shuffle: Put training pictures in an order that the seed decides, for readers that read shards from end to end.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        to: str | None = None,
        format: Format = "original",
        size: int | None = None,
        shard_size: int = 5000,
        quality: int = 95,
        pictures_alone: bool = False,
        shuffle: bool = True,
    ) -> None:
        if shard_size < 1 or (size is not None and size < 1):
            raise ValueError(f"size={size} and shard_size={shard_size}: both are numbers of at least 1")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality={quality} is not in [1, 100]")
        if size is not None and format == "original":
            raise ValueError(f"size={size}: a copied file keeps its size; give format=jpg, png or webp")
        if to == "":
            raise ValueError("to is empty; name a folder, or leave it out")
        self.config, self.format, self.size, self.quality = config, format, size, quality
        self.shard_size, self.shuffle, self.pictures_alone = shard_size, shuffle, pictures_alone
        self.folder = run_dir / "shards" if to is None else Path(to).expanduser()

    def run(self) -> None:
        """Write `<part>-000000.tar` and so on, and `manifest.json`."""
        data, parts = open_parts(self.config)
        if self.format == "original" and not all(isinstance(split, Files | Streams) for split in parts.values()):
            raise UserError(f"format=original: data '{self.config.data.name}' has no files to copy; give format=png")
        maps = None if self.pictures_alone else options_of_maps(self.config.data, parts.values(), self.format)
        tasks = [task for part, split in parts.items() for task in self._tasks(part, split)]
        made_of, names = self._made_of(data, parts, maps), {task.name for task in tasks}
        writer = Writer(self.folder, parts, self.format, self.size, self.quality, maps)
        try:
            Manifest(self.folder, made_of, names)  # a folder of somebody else gets no lock
            with held(self.folder, "to"):
                self._write(Manifest(self.folder, made_of, names), tasks, writer)
        except OSError as error:
            raise UserError(unwritable(error, self.folder, "to")) from error

    def _made_of(self, data: Data, parts: Mapping[str, Split], maps: Mapping[str, Any] | None) -> dict[str, Any]:
        asked = {"format": self.format, "size": self.size, "shard_size": self.shard_size, "quality": self.quality}
        asked |= {"shuffle": self.shuffle, "seed": self.config.seed}
        sources = {part: split.fingerprint for part, split in parts.items()}
        return {"asked": asked, "sources": sources, "classes": list(data.classes), "maps": maps}

    def _write(self, manifest: Manifest, tasks: list[Task], writer: Writer) -> None:
        manifest.open()
        doubt(manifest, writer, self.config.workers)
        losses = Losses(manifest, writer.parts)
        losses.check()
        left = [
            replace(task, had=manifest.doubtful.get(task.name)) for task in tasks if task.name not in manifest.shards
        ]
        if kept := [*manifest.shards.values()]:
            log.info("%d of %d shards are there already", len(kept), len(tasks))
        done = sum(each.pictures + len(each.left_out) for each in kept)
        try:
            with progress("shard", sum(map(len, writer.parts.values())), done) as bar:
                for written in spread(writer, left, self.config.workers):
                    manifest.add(written)
                    losses.count(written)
                    losses.check()
                    bar.advance(written.pictures + len(written.left_out))
            losses.check_nothing()
        finally:
            if left:
                manifest.save()
        manifest.save(finished=True)
        losses.tell()

    def _tasks(self, part: str, split: Split) -> Iterator[Task]:
        if isinstance(split, Streams):
            log.info("%s shards are streamed: each is copied to one, its pictures in their order", part)
            yield from (Task(f"{part}-{number:06d}.tar", part, [], number) for number in range(len(split.urls)))
            return
        order = torch.arange(len(split))
        if self.shuffle and part == "train":
            order = torch.randperm(len(split), generator=generator("shards", self.config.seed))
        for number, indices in enumerate(order.split(min(self.shard_size, len(split)))):
            yield Task(f"{part}-{number:06d}.tar", part, indices.tolist())

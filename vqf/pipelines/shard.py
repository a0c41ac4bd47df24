"""Any data source into tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vqf.errors import UserError
from vqf.lock import held, unwritable
from vqf.pipelines.drawn_file import DrawnPair, file_of
from vqf.pipelines.files import Files, PairFile, PictureFile, Streams, open_parts, sources_of, spread
from vqf.pipelines.pictures import condition_reader
from vqf.pipelines.shard_losses import Losses
from vqf.pipelines.shard_manifest import Manifest
from vqf.pipelines.shard_writer import Format, Task, Unreadable, Writer, attempt
from vqf.protocols import ConditionReader, Split
from vqf.randomness import generator
from vqf.registry import register
from vqf.terminal import log, progress

BY_CHANNELS = {1: "grey", 3: "rgb"}
ALONE = "pictures_alone=true writes the pictures alone"


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
        maps = None if self.pictures_alone else self._maps(parts.values())
        tasks = [task for part, split in parts.items() for task in self._tasks(part, split)]
        asked = {"format": self.format, "size": self.size, "shard_size": self.shard_size, "quality": self.quality}
        asked |= {"shuffle": self.shuffle, "seed": self.config.seed}
        sources = {part: split.fingerprint for part, split in parts.items()}
        made_of = {"asked": asked, "sources": sources, "classes": list(data.classes), "maps": maps}
        writer = Writer(self.folder, parts, self.format, self.size, self.quality, maps)
        names = {task.name for task in tasks}
        try:
            Manifest(self.folder, made_of, names)  # a folder of somebody else gets no lock
            with held(self.folder, "to"):
                self._write(Manifest(self.folder, made_of, names), tasks, writer)
        except OSError as error:
            raise UserError(unwritable(error, self.folder, "to")) from error

    def _write(self, manifest: Manifest, tasks: list[Task], writer: Writer) -> None:
        manifest.open()
        self._doubt(manifest, writer)
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

    def _doubt(self, manifest: Manifest, writer: Writer) -> None:
        """Doubt the shards from which something is missing that may be there by now."""
        streamed = {part for part, split in writer.parts.items() if isinstance(split, Streams)}
        files = [each for each in manifest.shards.values() if each.part not in streamed]
        for each in files:
            if not all(writer.has(each.part, lost.key) for lost in each.left_out):  # somebody has edited it
                del manifest.shards[each.name]
        files = [each for each in files if each.name in manifest.shards]
        looks = [(each.name, each.part, lost.key) for each in files for lost in each.left_out]
        with progress("look again", len(looks)) as bar:
            for name, readable in spread(partial(_look, writer), looks, self.config.workers):
                if readable:
                    manifest.doubt(name)
                bar.advance()
        losses = Losses(manifest, writer.parts)
        for each in [*manifest.shards.values()]:
            # A picture of a stream comes with all of its shard alone: only what would stop the run is fetched again.
            if each.broken or (each.left_out and each.part in streamed and losses.too_many(each.part)):
                manifest.doubt(each.name)
        for name in manifest.doubtful:
            log.info("'%s' is written again: something was missing from it", name)

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

    def _maps(self, parts: Collection[Split]) -> dict[str, Any] | None:
        """Return the options of `data=shard_pairs` that read the maps; None where there are none.

        Raises:
            UserError: If there are maps of several kinds, or such as no option reads.
        """
        name, sources = self.config.data.name, [each for split in parts for _, each in sources_of(split)]
        mapped = [each for each in sources if has_maps(each)]
        if not mapped:
            return None
        if len(mapped) < len(sources):
            raise UserError(f"data '{name}' has maps in some of its sources alone; {ALONE}")
        try:
            reader = condition_reader(self.config.data)
        except ValueError as error:
            raise UserError(f"{error}; {ALONE}") from error
        options = dict(getattr(reader, "options", None) or self._by_channels(reader, mapped))
        if options["maps"] == "labels" and self.format != "original":
            options["unlabelled"] = None  # written as class 0, with all others moved up
            if options["labels"] > 2**16:
                raise UserError(
                    f"data.labels={options['labels']}: a PNG holds numbers below 65536; format=original, or {ALONE}"
                )
        return options

    def _by_channels(self, reader: ConditionReader | None, mapped: Collection[Split]) -> dict[str, Any]:
        if reader is not None and reader.classes:
            return {"maps": "labels", "labels": reader.classes, "unlabelled": None}
        channels = {_channels(each) for each in mapped}
        if len(channels) > 1 or not channels <= BY_CHANNELS.keys():
            counts = " and ".join(map(str, sorted(channels)))
            raise UserError(
                f"data '{self.config.data.name}' has maps of {counts} channels, and no function condition_reader says "
                f"what they are (vqf.protocols.Data); {ALONE}"
            )
        return {"maps": BY_CHANNELS[channels.pop()]}


def has_maps(split: Split) -> bool:
    """Say whether the pictures of a source have maps beside them, by the first that can be had."""
    if isinstance(split, Streams):
        return getattr(split, "reading", None) is not None
    return isinstance(_first(split), PairFile)


def _first(split: Split) -> PictureFile | None:
    """Return the first picture that can be had."""
    files = (attempt(partial(file_of, split, index)) for index in range(len(split)))
    return next((each for each in files if not isinstance(each, Unreadable)), None)


def _look(writer: Writer, at: tuple[str, str, str]) -> tuple[str, bool]:
    name, part, key = at
    return name, writer.can_read(part, key)


def _channels(split: Split) -> int:
    file = _first(split)
    condition = file.sample.condition if isinstance(file, DrawnPair) else split.item(0, 0).condition
    return 0 if condition is None else len(condition)

"""Any data source into tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vqf.errors import UserError
from vqf.pipelines.files import Files, PairFile, Streams, open_parts, spread
from vqf.pipelines.pictures import condition_reader
from vqf.pipelines.shard_manifest import MANIFEST, Manifest
from vqf.pipelines.shard_writer import Drawn, Format, Task, Writer, file_of
from vqf.protocols import Split
from vqf.randomness import generator
from vqf.registry import register
from vqf.terminal import log, progress

BY_CHANNELS = {1: "grey", 3: "rgb"}
NAMED = 10  # pictures that the log names; the manifest names all


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
        try:
            manifest = Manifest(self.folder, made_of)
            self._write(manifest, tasks, Writer(self.folder, parts, self.format, self.size, self.quality, maps))
            manifest.finish([task.name for task in tasks])
        except OSError as error:
            raise UserError(
                f"to={self.folder}: cannot be written ({(error.strerror or str(error)).lower()})"
            ) from error

    def _write(self, manifest: Manifest, tasks: list[Task], writer: Writer) -> None:
        left = [task for task in tasks if task.name not in manifest.shards]
        if len(left) < len(tasks):
            log.info("%d of %d shards are there already", len(tasks) - len(left), len(tasks))
        done = sum(each.pictures + len(each.left_out) for each in manifest.shards.values())
        with progress("shard", sum(map(len, writer.parts.values())), done) as bar:
            self._check_losses(manifest, writer.parts)
            for written in spread(writer, left, self.config.workers):
                manifest.add(written)
                bar.advance(written.pictures + len(written.left_out))
                self._check_losses(manifest, writer.parts)
        self._tell(manifest, writer.parts)

    def _tell(self, manifest: Manifest, parts: Mapping[str, Split]) -> None:
        shards = manifest.shards.values()
        lost = [(name, why) for each in shards for name, why in each.left_out.items()]
        for name, why in lost[:NAMED]:
            log.warning("left out: '%s' (%s)", name, why)
        for each in (each for each in shards if each.broken):
            log.warning("'%s' has no more of its shard than could be read (%s)", each.name, each.broken)
        for part, split in parts.items():
            held = sum(each.pictures + len(each.left_out) for each in shards if each.part == part)
            if isinstance(split, Streams) and held != len(split):
                log.warning("data.%s_pictures=%d: its shards hold %d", part, len(split), held)
        count = sum(each.pictures for each in shards)
        log.info("%d pictures in %d shards, %d left out: %s", count, len(shards), len(lost), self.folder)

    def _check_losses(self, manifest: Manifest, parts: Mapping[str, Split]) -> None:
        """Stop if too much of a part cannot be read; what is finished stays."""
        for part, split in parts.items():
            written = [each for each in manifest.shards.values() if each.part == part]
            lost = [f"'{name}' ({why})" for each in written for name, why in each.left_out.items()]
            broken = [f"'{each.name}' ({each.broken})" for each in written if each.broken]
            self._check_loss(f"{len(split)} {part} pictures", lost, getattr(split, "tolerance", len(split)))
            if isinstance(split, Streams):
                self._check_loss(f"{len(split.urls)} {part} shards", broken, split.shard_tolerance)

    def _check_loss(self, of: str, lost: list[str], tolerated: int) -> None:
        if len(lost) > tolerated:
            raise UserError(
                f"data.max_bad: {len(lost)} of the {of} cannot be read, where {tolerated} may be left out; the last is "
                f"{lost[-1]}, '{self.folder / MANIFEST}' names all. What is written stays, and the same command with a "
                "larger max_bad goes on"
            )

    def _tasks(self, part: str, split: Split) -> Iterator[Task]:
        if isinstance(split, Streams):
            log.info(
                "%s shards are streamed: each is copied to one, in its order, however many pictures it holds", part
            )
            yield from (Task(f"{part}-{number:06d}.tar", part, [], number) for number in range(len(split.urls)))
            return
        order = torch.arange(len(split))
        if self.shuffle and part == "train":
            order = torch.randperm(len(split), generator=generator("shards", self.config.seed))
        for number, indices in enumerate(order.split(self.shard_size)):
            yield Task(f"{part}-{number:06d}.tar", part, indices.tolist())

    def _maps(self, parts: Collection[Split]) -> dict[str, Any] | None:
        """Return the options of `data=shard_pairs` that read the maps; None where there are none.

        Raises:
            UserError: If there are maps of several kinds, or such as no option reads.
        """
        if not any(map(has_maps, parts)):
            return None
        try:
            reader = condition_reader(self.config.data)
        except ValueError as error:
            raise UserError(f"{error}; pictures_alone=true writes the pictures alone") from error
        if options := getattr(reader, "options", None):
            return dict(options)
        if reader is not None and reader.classes:
            return {"maps": "labels", "labels": reader.classes, "unlabelled": None}
        channels = _channels(next(split for split in parts if has_maps(split)))
        if channels not in BY_CHANNELS:
            raise UserError(
                f"pictures_alone=false: data '{self.config.data.name}' has maps of {channels} channels, and its class "
                "no function condition_reader that says what they are (vqf.protocols.Data); pictures_alone=true leaves "
                "them out"
            )
        return {"maps": BY_CHANNELS[channels]}


def has_maps(split: Split) -> bool:
    """Say whether there is a map beside the first picture, or the last: a union's sources differ."""
    if isinstance(split, Streams):
        return getattr(split, "reading", None) is not None
    files = [file_of(split, index) for index in {0, len(split) - 1}]
    return any(
        each.sample.condition is not None if isinstance(each, Drawn) else isinstance(each, PairFile) for each in files
    )


def _channels(split: Split) -> int:
    condition = split.item(0, 0).condition
    return 0 if condition is None else len(condition)

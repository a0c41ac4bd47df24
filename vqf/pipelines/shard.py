"""Any data source into tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from PIL import Image

from vqf.errors import UserError
from vqf.pipelines.files import Files, open_parts, spread
from vqf.pipelines.pictures import to_image
from vqf.protocols import Split
from vqf.randomness import generator
from vqf.registry import register
from vqf.terminal import log, progress

VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm", "TIFF": "tif"}
FORMATS = {ending: name for name, ending in ENDINGS.items()}

Format = Literal["original", "jpg", "png", "webp"]


@dataclass(frozen=True)
class Task:
    """One shard: its file, and which pictures of a part it holds."""

    name: str
    part: str
    indices: list[int]


@dataclass(frozen=True)
class Written:
    """What the manifest says of a shard; `left_out` is why some pictures are not in it."""

    name: str
    pictures: int
    bytes: int
    sha256: str
    left_out: dict[str, str] = field(default_factory=dict)


@register("pipeline", "shard")
class Shard:
    """Write the pictures of `data` into tar shards that `data=shards` and webdataset read, with a manifest.

    A picture `00000012.jpg` has its label beside it as `.cls`, and its name as `.json`; pictures that cannot be read
    are left out and named in the manifest. Shards that an earlier run finished are kept; a run that is killed leaves
    none half-written. `workers` is how many are written at a time.

    Args:
        to: The folder of the shards; `shards/` of the run's folder by default.
        format: Of the pictures. "original" copies the files of a source that has them, byte by byte; the others
            store the whole picture, upright and in RGB. A source without files gives what it shows in epoch 0.
        size: What a shorter side that is longer is scaled down to.
        shard_size: Pictures of a shard.
        quality: Of jpg and webp.
        pictures_alone: Leave out the maps of a source that has some, which shards do not keep.
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
        if self.format == "original" and not all(isinstance(split, Files) for split in parts.values()):
            raise UserError(f"format=original: data '{self.config.data.name}' has no files to copy; give format=png")
        if not self.pictures_alone and any(map(_has_maps, parts.values())):
            raise UserError(
                f"pictures_alone=false: data '{self.config.data.name}' has maps, and shards keep none; train on it as "
                "it is, or write its pictures with pictures_alone=true"
            )
        tasks = [task for part, split in parts.items() for task in self._tasks(part, split)]
        asked = {"format": self.format, "size": self.size, "shard_size": self.shard_size, "quality": self.quality}
        asked |= {"shuffle": self.shuffle, "seed": self.config.seed}
        sources = {part: split.fingerprint for part, split in parts.items()}
        try:
            manifest = Manifest(self.folder, {"asked": asked, "sources": sources, "classes": list(data.classes)})
            self._write(manifest, tasks, Writer(self.folder, parts, self.format, self.size, self.quality))
            manifest.finish([task.name for task in tasks])
        except OSError as error:
            raise UserError(
                f"to={self.folder}: cannot be written ({(error.strerror or str(error)).lower()})"
            ) from error

    def _write(self, manifest: "Manifest", tasks: list[Task], writer: "Writer") -> None:
        left = [task for task in tasks if task.name not in manifest.shards]
        if len(left) < len(tasks):
            log.info("%d of %d shards are there already", len(tasks) - len(left), len(tasks))
        total, done = (sum(len(task.indices) for task in some) for some in (tasks, left))
        with progress("shard", total, total - done) as bar:
            for written in spread(writer, left, self.config.workers):
                manifest.add(written)
                bar.advance(written.pictures + len(written.left_out))
        lost = {name: why for each in manifest.shards.values() for name, why in each.left_out.items()}
        for name, why in list(lost.items())[:10]:
            log.warning("left out: '%s' (%s)", name, why)
        log.info("%d pictures in %d shards, %d left out: %s", total - len(lost), len(tasks), len(lost), self.folder)

    def _tasks(self, part: str, split: Split) -> Iterator[Task]:
        order = torch.arange(len(split))
        if self.shuffle and part == "train":
            order = torch.randperm(len(split), generator=generator("shards", self.config.seed))
        for number, indices in enumerate(order.split(self.shard_size)):
            yield Task(f"{part}-{number:06d}.tar", part, indices.tolist())


@dataclass(frozen=True)
class Writer:
    """Writes shards, in any process."""

    folder: Path
    parts: dict[str, Split]
    format: Format
    size: int | None
    quality: int

    def __call__(self, task: Task) -> Written:
        """Write a shard beside its final name, flush it and rename it."""
        from webdataset import TarWriter

        temporary, left_out = self.folder / f".{task.name}{PARTIAL}", {}
        with temporary.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                for index in task.indices:
                    try:
                        tar.write(self._sample(self.parts[task.part], index))
                    except UserError:
                        raise
                    except ValueError as error:  # what a picture that cannot be read raises
                        left_out[_name(self.parts[task.part], index)] = str(error)
            file.flush()
            os.fsync(file.fileno())
        facts = temporary.stat().st_size, sha256(temporary)
        temporary.replace(self.folder / task.name)
        return Written(task.name, len(task.indices) - len(left_out), *facts, left_out)

    def _sample(self, split: Split, index: int) -> dict[str, Any]:
        if isinstance(split, Files):
            labels = getattr(split, "labels", None)
            label = None if labels is None else int(labels[index])
            ending, content = self._file(split, index)
        else:
            sample = split.item(0, index)
            label, (ending, content) = sample.label, self._encoded(to_image(sample.image))
        facts = {"name": _name(split, index)}
        told = {} if label is None else {"cls": str(label).encode()}
        return {"__key__": f"{index:08d}", ending: content, "json": json.dumps(facts).encode(), **told}

    def _file(self, split: Files, index: int) -> tuple[str, bytes]:
        if self.format != "original":
            return self._encoded(split.picture(index))
        content = split.stored(index)
        return ENDINGS[split.facts(index, content)[0]], content

    def _encoded(self, image: Image.Image) -> tuple[str, bytes]:
        short = min(image.size)
        if self.size is not None and short > self.size:
            width, height = (max(round(side * self.size / short), 1) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, FORMATS[self.format], **({} if self.format == "png" else {"quality": self.quality}))
        return self.format, file.getvalue()


class Manifest:
    """`manifest.json`: what a folder of shards was made of, and which of them are finished.

    Raises:
        UserError: If the folder holds the shards of other pictures, or made with other options.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any]) -> None:
        self.path, self.made_of = folder / MANIFEST, {"version": VERSION, **made_of}
        self.shards: dict[str, Written] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.glob(f".*{PARTIAL}"):
            half.unlink()
        if self.path.exists():
            self._take_up(folder)

    def add(self, written: Written) -> None:
        """Record a finished shard."""
        self.shards[written.name] = written
        self._save(False)

    def finish(self, names: list[str]) -> None:
        """Record that these are all, in this order."""
        self.shards = {name: self.shards[name] for name in names}
        self._save(True)

    def _take_up(self, folder: Path) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = {key: found[key] for key in self.made_of} == self.made_of
            shards = [Written(**each) for each in found["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"to={folder}: its {MANIFEST} is not one of pipeline=shard; choose another folder"
            ) from error
        if not same:
            raise UserError(
                f"to={folder}: holds shards of other pictures, or with other options; choose another folder"
            )
        for each in shards:
            path = folder / Path(each.name).name
            if path.is_file() and path.stat().st_size == each.bytes and sha256(path) == each.sha256:
                self.shards[each.name] = each
            else:
                log.warning("'%s' is not what %s says; it is written again", path, MANIFEST)

    def _save(self, finished: bool) -> None:
        shards = [asdict(each) for each in self.shards.values()]
        pictures: dict[str, int] = {}
        for each in self.shards.values():
            part = each.name.rpartition("-")[0]
            pictures[part] = pictures.get(part, 0) + each.pictures
        content = {**self.made_of, "finished": finished, "pictures": pictures, "shards": shards}
        temporary = self.path.with_name(f".{MANIFEST}{PARTIAL}")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_maps(split: Split) -> bool:
    """Say whether the first picture has one, or the last: a union's sources differ."""
    return any(split.item(0, index).condition is not None for index in {0, len(split) - 1})


def _name(split: Split, index: int) -> str:
    names = getattr(split, "names", None)
    return f"{index}" if names is None else Path(names[index]).name if os.path.isabs(names[index]) else names[index]

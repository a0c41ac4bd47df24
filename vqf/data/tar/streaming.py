"""Shards that are read from end to end, because they lie elsewhere: what webdataset calls streaming.

In order, as validation and tokens want them, a stream is exact: picture i is always the same. Training reads its shards
side by side and shuffles what comes, which is not: the order depends on the number of ranks and workers, and a run that
goes on begins another one. No picture is dropped: see `PictureSplit` for what takes the place of a broken one.
"""

import hashlib
import io
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
from torch.utils.data import get_worker_info

from vqf.batch import Sample, Size
from vqf.data.files.dataset import listed, tolerated
from vqf.data.files.image_file import PictureFile
from vqf.data.images.augment import View, Views
from vqf.data.images.decode import Animated, Shown, UnreadableError, read
from vqf.data.labels import parse_label
from vqf.data.tar import remote_io
from vqf.data.tar.members import Roles
from vqf.data.tar.remote_io import BrokenShardError, shard_name, shown
from vqf.data.tar.replay import Raw, Tape
from vqf.errors import UserError, quoted
from vqf.seeding import generator, mix

log = logging.getLogger("vqf")

NAMES = 2**20  # places for the names of bad pictures: two hardly ever share one


class Source(Protocol):
    """What `data=shards` says of the pictures of a stream."""

    size: Size
    seed: int
    views: Views
    animated: Animated
    max_pixels: int
    max_bad: float
    roles: Roles
    buffer: int
    classes: list[str]


@dataclass(frozen=True)
class Stream:
    """The shards of a part, and how many pictures they hold; `known` is what tells them from others."""

    urls: list[str]
    length: int
    known: tuple[object, ...] = ()


class StreamSplit:
    """The pictures of the shards of a part."""

    def __init__(self, data: Source, part: str, stream: Stream) -> None:
        self.data, self.part, self.urls, self.length = data, part, stream.urls, stream.length
        self.views = data.views if part == "train" else data.views.still()
        self.fingerprint = hashlib.sha256(repr(self.facts(stream)).encode()).hexdigest()
        # Known to all processes: which pictures are bad, by a hash of their names, and which shards are broken.
        self.bad, self.broken = (torch.zeros(n, dtype=torch.bool).share_memory_() for n in (NAMES, len(stream.urls)))
        self.tape: Tape | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "tape": None}

    @property
    def readers(self) -> int:
        """How many processes can share the shards."""
        return len(self.urls)

    def item(self, epoch: int, index: int) -> Sample:
        """Return the picture that comes at a place, or the next readable one.

        Indices that rise cost one reading of the shards; a lower one begins another.

        Raises:
            UserError: If too much cannot be read, or the shards hold fewer pictures than was said.
        """
        view = self.views.draw(generator(self.data.seed, epoch, index))
        tape = self._tape()
        for raw in itertools.chain(tape.since(index), tape.since(0)):
            if (sample := self._sample(raw, view)) is not None:
                self._check_length(tape)
                return sample
        self._check_length(tape)
        raise self._nothing()

    def stream(self, start: int, rank: int, world: int) -> Iterator[Sample]:
        """Yield training pictures for ever, in the part of the shards that this process reads.

        Every process has shards of its own, and reads them again and again, each time in another order, through a
        buffer in which the pictures are shuffled; no picture comes again before each has come once.

        Args:
            start: The step at which the run begins, or goes on.
            rank: This process among `world`, not counting those that load data.

        Raises:
            UserError: If too much cannot be read.
        """
        from webdataset.filters import _shuffle

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = list(range(len(self.urls)))[rank * workers + worker :: world * workers]
        random = Random(mix(self.data.seed, "stream", start, rank, worker))
        for turn in itertools.count():
            random.shuffle(mine)
            fruitful = False
            for raw in _shuffle(self._raws(mine), self.data.buffer, self.data.buffer, rng=random):
                view = self.views.draw(generator(self.data.seed, turn, raw.name))
                if (sample := self._sample(raw, view)) is not None:
                    fruitful = True
                    yield sample
            if not fruitful:
                raise self._nothing()

    def _raws(self, shards: Iterable[int]) -> Iterator[Raw]:
        """Yield the pictures of shards in order; one that is broken ends where it breaks."""
        for shard in shards:
            try:
                yield from self._pictures(shard)
            except BrokenShardError as error:
                self._count_shard(shard, str(error))

    def files(self, shard: int) -> Iterator[PictureFile]:
        """Yield the pictures of a shard as files, as they come.

        Raises:
            BrokenShardError: In the end, if it cannot be read to its own.
            UserError: If there is a label that cannot be.
        """
        command = f"{self.urls[shard]}/" if self.urls[shard].startswith("pipe:") else ""  # which may hold a password
        for raw in self._pictures(shard):
            yield self.file(raw, raw.name.removeprefix(command))

    def file(self, raw: Raw, name: str) -> PictureFile:
        """Return a picture as a file of some name."""
        return PictureFile(self.data, name, self._label(raw), lambda: io.BytesIO(raw.content))

    def address(self, shard: int) -> str:
        """Return where a shard is, as it may be shown."""
        return shown(self.urls[shard])

    def _pictures(self, shard: int) -> Iterator[Raw]:
        url, roles = self.urls[shard], self.data.roles
        for sample in remote_io.samples(url):
            key = sample.pop("__key__")
            endings = [each for each in sample if each != "__url__"]
            if (picture := roles.picture_among(endings)) is None:
                continue
            name = f"{shard_name(url)}/{key}.{picture}"
            found = roles.map_among(endings)
            condition = (f"{key}.{found}", sample[found]) if found else ("", b"")
            yield Raw(name, sample[picture], sample.get(roles.label), *condition)

    def _tape(self) -> Tape:
        """Return what reads the shards in order; a process that is forked does not go on with another's."""
        if self.tape is None or self.tape.process != os.getpid():
            self.tape = Tape(lambda: self._raws(range(len(self.urls))))
        return self.tape

    def _sample(self, raw: Raw, view: View) -> Sample | None:
        try:
            shown = self.decoded(raw, view)
        except UnreadableError as error:
            self._count(raw, str(error))
            return None
        return Sample(view.finish(shown.picture), self._label(raw), place=view.turn(shown.place))

    def decoded(self, raw: Raw, view: View) -> Shown:
        """Return what a view shows of a picture.

        Raises:
            UnreadableError: If it cannot be read.
        """
        data = self.data
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "animated": data.animated}
        return read(io.BytesIO(raw.content), data.size, view, resize=self.views.resize, **limits)

    def _label(self, raw: Raw) -> int | None:
        data = self.data
        if not data.classes:
            return None
        if raw.label is None:
            raise UserError(f"data.root: '{raw.name}' has no label beside it; data.classes=0 goes on without")
        label = parse_label(raw.label.decode("utf-8", "replace"), data.roles.label_key, raw.name)
        if not isinstance(label, int) or label >= len(data.classes):
            raise UserError(f"data.root: the label beside '{raw.name}' is {label!r}, not below {len(data.classes)}")
        return label

    @property
    def tolerance(self) -> int:
        """How many pictures may be unreadable."""
        return tolerated(self.data.max_bad, self.length)

    @property
    def shard_tolerance(self) -> int:
        """How many shards may be missing or broken."""
        return tolerated(self.data.max_bad, len(self.urls))

    def faults(self) -> list[torch.Tensor]:
        """Return which pictures and shards cannot be read, as far as anybody has looked."""
        return [self.bad, self.broken]

    def check_faults(self, last: str = "") -> None:
        """Stop if they are too many.

        Args:
            last: What is to be said of the one that was found just now.

        Raises:
            UserError: If they are.
        """
        pictures, shards = int(self.bad.sum()), int(self.broken.sum())
        of_part = f"data.max_bad={self.data.max_bad:g}: {{}} of the {{}} {self.part} "
        if pictures > self.tolerance:
            raise UserError(f"{of_part.format(pictures, self.length)}pictures cannot be read{last}")
        if shards > self.shard_tolerance:
            names = listed([shown(self.urls[i]) for i in self.broken.nonzero().flatten().tolist()])
            log.warning(f"data.root: cannot read to their end {names}")
            raise UserError(f"{of_part.format(shards, len(self.urls))}shards cannot be read to their end{last}")

    def _count(self, raw: Raw, reason: str) -> None:
        place = mix(raw.name) % NAMES
        if self.bad[place]:
            return
        self.bad[place] = True
        self.check_faults(f"; the last is {quoted(raw.name)} ({reason})")
        log.warning(f"data.root: cannot read {quoted(raw.name)} ({reason}); the next picture takes its place")

    def _count_shard(self, shard: int, reason: str) -> None:
        if self.broken[shard]:
            return
        self.broken[shard] = True
        name = shown(self.urls[shard])
        self.check_faults(f"; the last is '{name}' ({reason})")
        log.warning(f"data.root: cannot read the shard '{name}' to its end ({reason}); other pictures take the places")

    def _check_length(self, tape: Tape) -> None:
        if tape.length is not None and self.length - tape.length > self.tolerance:
            raise UserError(
                f"data.{self.part}_pictures={self.length}: its {len(self.urls)} shards hold {tape.length} pictures"
            )

    def _nothing(self) -> UserError:
        last = shown(self.urls[-1])
        return UserError(f"data.{self.part}: no picture in {len(self.urls)} shards can be read; the last is '{last}'")

    def facts(self, stream: Stream) -> list[object]:
        """Return what decides which pictures there are, and how they look."""
        data = self.data
        facts = [data.size, self.views.facts, data.max_pixels, data.animated, data.roles.image, data.roles.label_key]
        seed = data.seed if self.views.random else None
        return [*facts, data.classes, stream.urls, stream.length, stream.known, seed]

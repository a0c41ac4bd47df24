"""Shards that are read from end to end, because they lie elsewhere: what webdataset calls streaming.

In order, as validation and tokens want them, a stream is exact: image i is always the same. Training reads its shards
side by side and shuffles what comes, which is not: the order depends on the number of ranks and workers, and a run that
goes on begins another one. No image is dropped: see `ImageSplit` for what takes the place of a broken one.
"""

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
from vqf.data.files.dataset import allowed_unreadable, summarize_names
from vqf.data.files.image_file import ImageFile
from vqf.data.images.augment import Augmentation, ViewParams
from vqf.data.images.decode import Animated, CroppedImage, UnreadableError, read_crop
from vqf.data.labels import parse_label
from vqf.data.tar import remote_io
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.remote_io import BrokenShardError, redact_url, shard_name
from vqf.data.tar.replay import RawSample, ReplayableStream
from vqf.errors import UserError, quote_name
from vqf.hashing import sha256_of
from vqf.seeding import hash_seed, seeded_generator

log = logging.getLogger("vqf")

NAME_SLOTS = 2**20  # places for the names of bad images: two hardly ever share one


class StreamSource(Protocol):
    """What `data=shards` says of the images of a stream."""

    size: Size
    seed: int
    augmentation: Augmentation
    animated: Animated
    max_pixels: int
    max_unreadable: float
    member_roles: SampleMembers
    shuffle_buffer: int
    classes: list[str]


@dataclass(frozen=True)
class StreamedShards:
    """The shards of a part, and how many images they hold; `hashes` is what tells them from others."""

    urls: list[str]
    length: int
    hashes: tuple[object, ...] = ()


class StreamSplit:
    """The images of the shards of a part."""

    def __init__(self, data: StreamSource, split_name: str, stream: StreamedShards) -> None:
        self.data, self.split_name, self.urls, self.length = data, split_name, stream.urls, stream.length
        self.augmentation = data.augmentation if split_name == "train" else data.augmentation.deterministic()
        self.fingerprint = sha256_of(self.fingerprint_fields(stream))
        # Known to all processes: which images are bad, by a hash of their names, and which shards are broken.
        self.unreadable, self.broken_shards = (
            torch.zeros(n, dtype=torch.bool).share_memory_() for n in (NAME_SLOTS, len(stream.urls))
        )
        self.replay: ReplayableStream | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "replay": None}

    @property
    def max_readers(self) -> int:
        """How many processes can share the shards."""
        return len(self.urls)

    def item(self, epoch: int, index: int) -> Sample:
        """Return the image that comes at a place, or the next readable one.

        Indices that rise cost one reading of the shards; a lower one begins another.

        Raises:
            UserError: If too much cannot be read, or the shards hold fewer images than was said.
        """
        view = self.augmentation.sample(seeded_generator(self.data.seed, epoch, index))
        tape = self._open_replay()
        for raw in itertools.chain(tape.iter_from(index), tape.iter_from(0)):
            if (sample := self._decode_sample(raw, view)) is not None:
                self._check_length(tape)
                return sample
        self._check_length(tape)
        raise self._all_unreadable_error()

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]:
        """Yield training images for ever, in the part of the shards that this process reads.

        Every process has shards of its own, and reads them again and again, each time in another order, through a
        buffer in which the images are shuffled; no image comes again before each has come once.

        Args:
            start: The step at which the run begins, or goes on.
            rank: This process among `world_size`, not counting those that load data.

        Raises:
            UserError: If too much cannot be read.
        """
        from webdataset.filters import _shuffle

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = list(range(len(self.urls)))[rank * workers + worker :: world_size * workers]
        random = Random(hash_seed(self.data.seed, "stream", start, rank, worker))
        for turn in itertools.count():
            random.shuffle(mine)
            fruitful = False
            for raw in _shuffle(
                self._raw_samples(mine), self.data.shuffle_buffer, self.data.shuffle_buffer, rng=random
            ):
                view = self.augmentation.sample(seeded_generator(self.data.seed, turn, raw.name))
                if (sample := self._decode_sample(raw, view)) is not None:
                    fruitful = True
                    yield sample
            if not fruitful:
                raise self._all_unreadable_error()

    def _raw_samples(self, shards: Iterable[int]) -> Iterator[RawSample]:
        """Yield the images of shards in order; one that is broken ends where it breaks."""
        for shard in shards:
            try:
                yield from self._shard_samples(shard)
            except BrokenShardError as error:
                self._record_broken_shard(shard, str(error))

    def iter_files(self, shard: int) -> Iterator[ImageFile]:
        """Yield the images of a shard as files, as they come.

        Raises:
            BrokenShardError: In the end, if it cannot be read to its own.
            UserError: If there is a label that cannot be.
        """
        command = f"{self.urls[shard]}/" if self.urls[shard].startswith("pipe:") else ""  # which may hold a password
        for raw in self._shard_samples(shard):
            yield self.file(raw, raw.name.removeprefix(command))

    def file(self, raw: RawSample, name: str) -> ImageFile:
        """Return an image as a file of some name."""
        return ImageFile(self.data, name, self._label(raw), lambda: io.BytesIO(raw.content))

    def display_url(self, shard: int) -> str:
        """Return where a shard is, as it may be shown."""
        return redact_url(self.urls[shard])

    def _shard_samples(self, shard: int) -> Iterator[RawSample]:
        url, roles = self.urls[shard], self.data.member_roles
        for sample in remote_io.iter_samples(url):
            key = sample.pop("__key__")
            endings = [each for each in sample if each != "__url__"]
            if (image := roles.find_image(endings)) is None:
                continue
            name = f"{shard_name(url)}/{key}.{image}"
            found = roles.find_map(endings)
            condition = (f"{key}.{found}", sample[found]) if found else ("", b"")
            yield RawSample(name, sample[image], sample.get(roles.label_extension), *condition)

    def _open_replay(self) -> ReplayableStream:
        """Return what reads the shards in order; a process that is forked does not go on with another's."""
        if self.replay is None or self.replay.pid != os.getpid():
            self.replay = ReplayableStream(lambda: self._raw_samples(range(len(self.urls))))
        return self.replay

    def _decode_sample(self, raw: RawSample, view: ViewParams) -> Sample | None:
        try:
            shown = self.decode(raw, view)
        except UnreadableError as error:
            self._record_unreadable(raw, str(error))
            return None
        return Sample(view.apply(shown.image), self._label(raw), crop_box=view.flip_box(shown.crop_box))

    def decode(self, raw: RawSample, view: ViewParams) -> CroppedImage:
        """Return what a view shows of an image.

        Raises:
            UnreadableError: If it cannot be read.
        """
        data = self.data
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "animated": data.animated}
        return read_crop(io.BytesIO(raw.content), data.size, view, resize=self.augmentation.resize, **limits)

    def _label(self, raw: RawSample) -> int | None:
        data = self.data
        if not data.classes:
            return None
        if raw.label is None:
            raise UserError(f"data.root: '{raw.name}' has no label beside it; data.classes=0 goes on without")
        label = parse_label(raw.label.decode("utf-8", "replace"), data.member_roles.label_key, raw.name)
        if not isinstance(label, int) or label >= len(data.classes):
            raise UserError(f"data.root: the label beside '{raw.name}' is {label!r}, not below {len(data.classes)}")
        return label

    @property
    def unreadable_limit(self) -> int:
        """How many images may be unreadable."""
        return allowed_unreadable(self.data.max_unreadable, self.length)

    @property
    def broken_shard_limit(self) -> int:
        """How many shards may be missing or broken."""
        return allowed_unreadable(self.data.max_unreadable, len(self.urls))

    def read_error_flags(self) -> list[torch.Tensor]:
        """Return which images and shards cannot be read, as far as anybody has looked."""
        return [self.unreadable, self.broken_shards]

    def check_read_errors(self, last: str = "") -> None:
        """Stop if they are too many.

        Args:
            last: What is to be said of the one that was found just now.

        Raises:
            UserError: If they are.
        """
        images, shards = int(self.unreadable.sum()), int(self.broken_shards.sum())
        of_part = f"data.max_unreadable={self.data.max_unreadable:g}: {{}} of the {{}} {self.split_name} "
        if images > self.unreadable_limit:
            raise UserError(f"{of_part.format(images, self.length)}images cannot be read{last}")
        if shards > self.broken_shard_limit:
            names = summarize_names([redact_url(self.urls[i]) for i in self.broken_shards.nonzero().flatten().tolist()])
            log.warning(f"data.root: cannot read to their end {names}")
            raise UserError(f"{of_part.format(shards, len(self.urls))}shards cannot be read to their end{last}")

    def _record_unreadable(self, raw: RawSample, reason: str) -> None:
        place = hash_seed(raw.name) % NAME_SLOTS
        if self.unreadable[place]:
            return
        self.unreadable[place] = True
        self.check_read_errors(f"; the last is {quote_name(raw.name)} ({reason})")
        log.warning(f"data.root: cannot read {quote_name(raw.name)} ({reason}); the next image takes its place")

    def _record_broken_shard(self, shard: int, reason: str) -> None:
        if self.broken_shards[shard]:
            return
        self.broken_shards[shard] = True
        name = redact_url(self.urls[shard])
        self.check_read_errors(f"; the last is '{name}' ({reason})")
        log.warning(f"data.root: cannot read the shard '{name}' to its end ({reason}); other images take the places")

    def _check_length(self, tape: ReplayableStream) -> None:
        if tape.length is not None and self.length - tape.length > self.unreadable_limit:
            raise UserError(
                f"data.{self.split_name}_images={self.length}: its {len(self.urls)} shards hold {tape.length} images"
            )

    def _all_unreadable_error(self) -> UserError:
        last = redact_url(self.urls[-1])
        return UserError(
            f"data.{self.split_name}: no image in {len(self.urls)} shards can be read; the last is '{last}'"
        )

    def fingerprint_fields(self, stream: StreamedShards) -> list[object]:
        """Return what decides which images there are, and how they look."""
        data = self.data
        facts = [
            data.size,
            self.augmentation.fingerprint_fields,
            data.max_pixels,
            data.animated,
            data.member_roles.image,
            data.member_roles.label_key,
        ]
        seed = data.seed if self.augmentation.is_random else None
        return [*facts, data.classes, stream.urls, stream.length, stream.hashes, seed]

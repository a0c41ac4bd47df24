"""The split of `data=shards` at URLs, read from start to end.

Read in order, index i is always the same image. The shuffled order of training depends on the number of ranks and
workers, and changes on resume.
"""

import io
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any, Protocol

import torch
from torch.utils.data import get_worker_info

from vqf.batch import Sample, Size
from vqf.data.files.image_file import ImageFile
from vqf.data.files.read_errors import DarkNote, ReadErrorCounter
from vqf.data.images.augment import Augmentation, ViewParams
from vqf.data.images.decode import Animated, CroppedImage, UnreadableError, read_crop
from vqf.data.images.pixel_values import PixelRange
from vqf.data.labels import parse_label
from vqf.data.tar import remote_io
from vqf.data.tar.inventory import StreamNotes
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.remote import StreamedShards
from vqf.data.tar.remote_io import BrokenShardError, RawSample, redact_url
from vqf.data.tar.replay import ReplayableStream
from vqf.errors import UserError, quote_name
from vqf.hashing import sha256_of
from vqf.seeding import hash_seed, seeded_generator

log = logging.getLogger("vqf")

NAME_SLOTS = 2**20  # flags of unreadable images, by a hash of their names: two of few names rarely share one


class StreamSource(Protocol):
    """What a streamed split needs of `data=shards`."""

    size: Size
    seed: int
    augmentation: Augmentation
    animated: Animated
    max_pixels: int
    pixel_range: PixelRange | None
    max_unreadable: float
    member_roles: SampleMembers
    shuffle_buffer: int
    classes: list[str]


class StreamSplit:
    """Training or validation images of streamed shards."""

    def __init__(self, data: StreamSource, split_name: str, stream: StreamedShards) -> None:
        self.data, self.split_name, self.urls, self.length = data, split_name, stream.urls, stream.length
        self.augmentation = data.augmentation if split_name == "train" else data.augmentation.deterministic()
        self.fingerprint = sha256_of(self.fingerprint_fields(stream))
        # An image has no index before it is read, so that its flag is chosen by a hash of its name.
        self.image_errors = ReadErrorCounter(
            f"{split_name} images", self.length, data.max_unreadable, slots=NAME_SLOTS, all_may_fail=True
        )
        self.shard_errors = ReadErrorCounter(
            f"{split_name} shards",
            len(stream.urls),
            data.max_unreadable,
            failure="cannot be read to their end",
            name_of=[redact_url(url) for url in stream.urls].__getitem__,
            all_may_fail=True,
        )
        self.dark_note = DarkNote()
        self.notes = StreamNotes(data.member_roles)
        self.replay: ReplayableStream | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "replay": None}  # an open stream cannot be pickled

    @property
    def max_readers(self) -> int:
        return len(self.urls)

    def item(self, epoch: int, index: int) -> Sample:
        """Read an image of the stream, or the next readable one; a lower index than the last one starts over.

        Raises:
            UserError: If too many images cannot be read, or the shards hold fewer than `length`.
        """
        view = self.augmentation.sample(seeded_generator(self.data.seed, epoch, index))
        replay = self._open_replay()
        for raw in itertools.chain(replay.iter_from(index), replay.iter_from(0)):
            if (sample := self._decode_sample(raw, view)) is not None:
                self._check_length(replay)
                return sample
        self._check_length(replay)
        raise self._all_unreadable_error()

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]:
        """Yield training images forever from this process's share, each once per pass, shuffled anew.

        Args:
            start: Step at which the run starts or resumes; it seeds the order.

        Raises:
            UserError: If too many images or shards cannot be read.
        """
        from webdataset.filters import _shuffle

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        shards = list(range(len(self.urls)))[rank * workers + worker :: world_size * workers]
        random = Random(hash_seed(self.data.seed, "stream", start, rank, worker))
        buffer = self.data.shuffle_buffer
        for turn in itertools.count():
            random.shuffle(shards)
            any_readable = False
            for raw in _shuffle(self._raw_samples(shards), buffer, buffer, rng=random):
                view = self.augmentation.sample(seeded_generator(self.data.seed, turn, raw.name))
                if (sample := self._decode_sample(raw, view)) is not None:
                    any_readable = True
                    yield sample
            if not any_readable:  # or this would loop forever
                raise self._all_unreadable_error()

    def iter_files(self, shard: int) -> Iterator[ImageFile]:
        """Yield the images of a shard as files, in order.

        Raises:
            BrokenShardError: After the last readable image.
            UserError: If a label is invalid.
        """
        command = f"{self.urls[shard]}/" if self.urls[shard].startswith("pipe:") else ""  # may hold a password
        for raw in remote_io.iter_raw_samples(self.urls[shard], self.data.member_roles):
            yield self.file(raw, raw.name.removeprefix(command))

    def file(self, raw: RawSample, name: str) -> ImageFile:
        return ImageFile(self.data, name, self._label(raw), lambda: io.BytesIO(raw.content))

    def display_url(self, shard: int) -> str:
        """Return the URL of a shard without secrets."""
        return redact_url(self.urls[shard])

    def decode(self, raw: RawSample, view: ViewParams) -> CroppedImage:
        """Decode the crop that a view shows.

        Raises:
            UnreadableError: If it cannot be decoded.
        """
        data = self.data
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "animated": data.animated}
        limits |= {"pixel_range": data.pixel_range, "resize": self.augmentation.resize}
        crop = read_crop(io.BytesIO(raw.content), data.size, view, **limits)
        self.dark_note.check(raw.name, crop.values, data.pixel_range)
        return crop

    @property
    def unreadable_limit(self) -> int:
        return self.image_errors.limit

    @property
    def broken_shard_limit(self) -> int:
        return self.shard_errors.limit

    def read_error_flags(self) -> list[torch.Tensor]:
        """Return the flags of unreadable images, then of broken shards."""
        return [self.image_errors.flags, self.shard_errors.flags]

    def check_read_errors(self) -> None:
        """Check the numbers of unreadable images and broken shards.

        Raises:
            UserError: If one is too high.
        """
        self.image_errors.check()
        self.shard_errors.check()

    def fingerprint_fields(self, stream: StreamedShards) -> list[object]:
        data = self.data
        options: list[object] = [
            data.size,
            self.augmentation.fingerprint_fields,
            data.max_pixels,
            data.animated,
            data.member_roles.image,
            data.member_roles.label_key,
        ]
        options += [] if data.pixel_range is None else [data.pixel_range]
        options += [] if data.member_roles.key == "first_dot" else [data.member_roles.key]
        seed = data.seed if self.augmentation.is_random else None
        return [*options, data.classes, stream.urls, stream.length, stream.hashes, seed]

    def _raw_samples(self, shards: Iterable[int]) -> Iterator[RawSample]:
        for shard in shards:
            try:
                yield from remote_io.iter_raw_samples(self.urls[shard], self.data.member_roles, self.notes.add)
            except BrokenShardError as error:
                self._record_broken_shard(shard, str(error))

    def _open_replay(self) -> ReplayableStream:
        """Return this process's own reader: two would share one file."""
        if self.replay is None or self.replay.pid != os.getpid():
            self.replay = ReplayableStream(lambda: self._raw_samples(range(len(self.urls))))
        return self.replay

    def _decode_sample(self, raw: RawSample, view: ViewParams) -> Sample | None:
        try:
            crop = self.decode(raw, view)
        except UnreadableError as error:
            self._record_unreadable(raw, str(error))
            return None
        return Sample(view.apply(crop.image), self._label(raw), crop_box=view.flip_box(crop.crop_box))

    def _label(self, raw: RawSample) -> int | None:
        data = self.data
        if not data.classes:
            return None
        if raw.label is None:
            raise UserError(f"data.root: '{raw.name}' has no label beside it; data.classes=0 trains without labels")
        label = parse_label(raw.label.decode("utf-8", "replace"), data.member_roles.label_key, raw.name)
        if not isinstance(label, int) or label >= len(data.classes):
            raise UserError(f"data.root: the label beside '{raw.name}' is {label!r}, not below {len(data.classes)}")
        return label

    def _record_unreadable(self, raw: RawSample, reason: str) -> None:
        if self.image_errors.add(hash_seed(raw.name) % NAME_SLOTS, raw.name, reason):
            log.warning(f"data.root: cannot read {quote_name(raw.name)} ({reason}); the next image takes its place")

    def _record_broken_shard(self, shard: int, reason: str) -> None:
        name = self.display_url(shard)
        if self.shard_errors.add(shard, name, reason):
            log.warning(f"data.root: cannot read the shard '{name}' to its end ({reason}); other images are used")

    def _check_length(self, replay: ReplayableStream) -> None:
        if replay.length is not None and self.length - replay.length > self.unreadable_limit:
            raise UserError(
                f"data.{self.split_name}_images={self.length}: its {len(self.urls)} shards hold {replay.length} images"
            )

    def _all_unreadable_error(self) -> UserError:
        last = redact_url(self.urls[-1])
        return UserError(
            f"data.{self.split_name}: no image in {len(self.urls)} shards can be read; the last is '{last}'"
        )

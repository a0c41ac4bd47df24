"""Tar shards whose samples hold a picture and its map: what `data=pairs` is to a folder."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import IO, Any

import torch

from vqf.batch import Sample, Size
from vqf.data.files.dataset import tolerated
from vqf.data.files.image_file import PairFile, map_of
from vqf.data.files.pair_dataset import MappedSplit, apart, on_top
from vqf.data.images.augment import AREA, RATIO, UNCHANGED, Crop, Resize, View
from vqf.data.images.decode import MAX_PIXELS, Animated, Shown, UnreadableError
from vqf.data.images.maps import Kind, Reading
from vqf.data.shards import Shards, ShardSplit, ending_of, told_apart
from vqf.data.tar.contents import GONE, Part
from vqf.data.tar.manifest import NAME
from vqf.data.tar.members import Roles
from vqf.data.tar.replay import Raw
from vqf.data.tar.streaming import Stream, StreamSplit
from vqf.errors import UserError, quoted
from vqf.registry import register

log = logging.getLogger("vqf")


@register("data", "shard_pairs")
class ShardPairs(Shards):
    """Pictures in tar shards, each with a map of the same place beside it: `Sample.condition` (C, H, W).

    The map of `0001.jpg` is `0001.condition.png` of the same shard; `pipeline=shard` writes pairs so. Maps are read as
    `data=pairs` reads them, and shards as `data=shards` does. Pictures have labels if each has one beside it. One
    without a map, or with one that cannot be read, counts as a picture that cannot be read.

    Args:
        root: The folder of the shards, or its address.
        train: As in `data=shards`.
        validation: As in `data=shards`.
        train_pictures: As in `data=shards`.
        validation_pictures: As in `data=shards`.
        buffer: As in `data=shards`.
        label_key: As in `data=shards`.
        classes: As in `data=shards`.
        image: The ending of the picture; by default the first member that is one, and no map.
        condition: The ending of the map: `png`, or `depth` for `0001.depth.png`, `0001.depth.tif` and so on.
        maps: What a map is, as in `data=pairs`. Where pipeline=shard wrote the shards it has to be what they were.
        labels: The number of classes of maps=labels.
        unlabelled: The number that stands for no class, as in `data=pairs`.
        index: As in `data=shards`.
        crop: As in `data=folder`.
        crop_area: As in `data=folder`.
        crop_ratio: As in `data=folder`.
        flip: Mirror every other training pair.
        jitter: As in `data=folder`; maps keep their colours.
        resize: As in `data=folder`; `rgb` and `grey` maps are always antialiased.
        animated: As in `data=folder`.
        max_pixels: The largest picture or map that is decoded, width times height.
        max_bad: As in `data=shards`, of pairs.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str | None = None,
        train: str | None = "train-*.tar",
        validation: str | None = "validation-*.tar",
        train_pictures: int | None = None,
        validation_pictures: int | None = None,
        buffer: int = 1000,
        label_key: str | None = None,
        classes: int | None = None,
        image: str | None = None,
        condition: str = "condition",
        maps: Kind = "rgb",
        labels: int = 0,
        unlabelled: int | None = None,
        index: str | None = None,
        crop: Crop = "random",
        crop_area: Sequence[float] = AREA,
        crop_ratio: Sequence[float] = RATIO,
        flip: bool = True,
        jitter: Sequence[float] = UNCHANGED,
        resize: Resize = "antialias",
        animated: Animated = "refuse",
        max_pixels: int = MAX_PIXELS,
        max_bad: float = 0.01,
    ) -> None:
        self.reading, self.condition = self.condition_reader(maps, labels, unlabelled), ending_of(condition)
        if not self.condition or (image and Roles(condition=self.condition).is_map(image.lower().lstrip("."))):
            raise ValueError(
                f"condition={condition} and image={image}: give the ending of a map, and another of its picture"
            )
        super().__init__(
            image_size,
            seed,
            root=root,
            train=train,
            validation=validation,
            train_pictures=train_pictures,
            validation_pictures=validation_pictures,
            buffer=buffer,
            label_key=label_key,
            classes=classes,
            image=image,
            index=index,
            crop=crop,
            crop_area=crop_area,
            crop_ratio=crop_ratio,
            flip=flip,
            jitter=jitter,
            resize=resize,
            animated=animated,
            max_pixels=max_pixels,
            max_bad=max_bad,
        )

    @staticmethod
    def condition_reader(maps: Kind = "rgb", labels: int = 0, unlabelled: int | None = None) -> Reading:
        """Return what reads a map that lies in no shard; see `vqf.protocols.Data`."""
        return Reading(maps, labels, unlabelled)

    def check_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Refuse shards whose maps are others than the options say.

        Raises:
            UserError: With the options that are right.
        """
        written = _reading(manifest.get("maps"))
        if written in (None, self.reading):
            return
        words = " ".join(f"data.{key}={'null' if value is None else value}" for key, value in written.options.items())
        raise UserError(f"data.maps={self.reading.kind}: {NAME} says how the maps of these shards are read: {words}")

    def indexed(self, name: str, part: Part, labels: torch.Tensor | None) -> "ShardPairSplit":
        """Return a part whose shards are in a folder.

        Raises:
            UserError: If too many of its pictures have no map.
        """
        alone = ((part.map_places[:, 2] == GONE) & (part.places[:, 2] != GONE)).nonzero()[0].tolist()
        if alone:
            what = f"{len(alone)} of the {len(part.names)} {name} pictures have no map: {quoted(part.names[alone[0]])} "
            what += f"has no .{self.condition} and no .{self.condition}.* beside it"
            if len(alone) > tolerated(self.max_bad, len(part.names)) or len(alone) == len(part.names):
                raise UserError(f"data.condition={self.condition}: {what}")
            log.warning(f"data.condition={self.condition}: {what}; other pairs take their places")
        return ShardPairSplit(self, name, part, labels)

    def streamed(self, name: str, stream: Stream) -> "StreamPairSplit":
        """Return a part whose shards are not."""
        return StreamPairSplit(self, name, stream)


class ShardPairSplit(MappedSplit, ShardSplit):
    """The pairs of the shards of a part."""

    def __init__(self, data: ShardPairs, name: str, part: Part, labels: torch.Tensor | None) -> None:
        self.reading, self.maps, self.map_places = data.reading, part.maps, part.map_places
        more = [astuple(data.reading), *told_apart(part.maps, part.map_places)]
        super().__init__(data, name, part, labels, more)

    def open_map(self, index: int) -> IO[bytes]:
        """Return the bytes of a map."""
        return self.member(index, self.map_places)


class StreamPairSplit(StreamSplit):
    """The pairs of shards that are read from end to end."""

    def __init__(self, data: ShardPairs, part: str, stream: Stream) -> None:
        self.reading, self.condition = data.reading, data.condition
        super().__init__(data, part, stream)

    def file(self, raw: Raw, name: str) -> PairFile:
        """Return a pair as the files that it is."""
        file = super().file(raw, name)
        return PairFile(**vars(file), reading=self.reading, map_name=raw.map_name, open_map=lambda: _map(raw))

    def decoded(self, raw: Raw, view: View) -> Shown:
        """See `StreamSplit`."""
        shown = super().decoded(raw, view)
        turn, most = self.reading.understood, self.data.max_pixels
        whole = map_of(shown.shape, lambda: _map(raw), raw.map_name, turn, most)
        return on_top(shown, whole, self.data.size, self.reading)

    def _sample(self, raw: Raw, view: View) -> Sample | None:
        sample = super()._sample(raw, view)
        return None if sample is None else apart(sample, self.reading)

    def facts(self, stream: Stream) -> list[object]:
        """See `StreamSplit`."""
        return [*super().facts(stream), astuple(self.reading), self.condition]


def _reading(said: Any) -> Reading | None:
    """Return how a manifest, which anybody may have written, says that maps are read; None if it says nothing."""
    match said:
        case {"maps": "rgb" | "grey" | "palette" as kind}:
            return Reading(kind)
        case {"maps": "labels", "labels": int(labels)} if labels > 1:
            unlabelled = said.get("unlabelled")
            return Reading("labels", labels, unlabelled if isinstance(unlabelled, int) else None)
    return None


def _map(raw: Raw) -> IO[bytes]:
    if not raw.map_name:
        raise UnreadableError("no map")
    return io.BytesIO(raw.map)

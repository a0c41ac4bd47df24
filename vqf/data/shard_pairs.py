"""Tar shards whose samples hold an image and its map: what `data=pairs` is to a folder."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import IO, Any

import torch

from vqf.batch import Sample, Size
from vqf.data.files.dataset import allowed_unreadable
from vqf.data.files.image_file import PairFile, decode_matching_map
from vqf.data.files.pair_dataset import PairedImageSplit, stack_map, unstack_map
from vqf.data.images.augment import DEFAULT_CROP_AREA, DEFAULT_CROP_RATIO, NO_JITTER, Crop, Resize, ViewParams
from vqf.data.images.decode import MAX_PIXELS, Animated, CroppedImage, UnreadableError
from vqf.data.images.maps import MapDecoder, MapKind
from vqf.data.shards import Shards, ShardSplit, content_key, normalize_extension
from vqf.data.tar.contents import CRC_MISSING, IndexedShards
from vqf.data.tar.manifest import MANIFEST_NAME
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.replay import RawSample
from vqf.data.tar.streaming import StreamedShards, StreamSplit
from vqf.errors import UserError, quote_name
from vqf.registry import register

log = logging.getLogger("vqf")


@register("data", "shard_pairs")
class ShardPairs(Shards):
    """Images in tar shards, each with a map of the same place beside it: `Sample.condition` (C, H, W).

    The map of `0001.jpg` is `0001.condition.png` of the same shard; `pipeline=shard` writes pairs so. Maps are read as
    `data=pairs` reads them, and shards as `data=shards` does. Images have labels if each has one beside it. One
    without a map, or with one that cannot be read, counts as an image that cannot be read.

    Args:
        root: The folder of the shards, or its address.
        train: As in `data=shards`.
        validation: As in `data=shards`.
        train_images: As in `data=shards`.
        validation_images: As in `data=shards`.
        buffer: As in `data=shards`.
        label_key: As in `data=shards`.
        classes: As in `data=shards`.
        image: The ending of the image; by default the first member that is one, and no map.
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
        max_pixels: The largest image or map that is decoded, width times height.
        max_unreadable: As in `data=shards`, of pairs.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str | None = None,
        train: str | None = "train-*.tar",
        validation: str | None = "validation-*.tar",
        train_images: int | None = None,
        validation_images: int | None = None,
        buffer: int = 1000,
        label_key: str | None = None,
        classes: int | None = None,
        image: str | None = None,
        condition: str = "condition",
        maps: MapKind = "rgb",
        labels: int = 0,
        unlabelled: int | None = None,
        index: str | None = None,
        crop: Crop = "random",
        crop_area: Sequence[float] = DEFAULT_CROP_AREA,
        crop_ratio: Sequence[float] = DEFAULT_CROP_RATIO,
        flip: bool = True,
        jitter: Sequence[float] = NO_JITTER,
        resize: Resize = "antialias",
        animated: Animated = "refuse",
        max_pixels: int = MAX_PIXELS,
        max_unreadable: float = 0.01,
    ) -> None:
        self.map_decoder, self.condition = (
            self.condition_reader(maps, labels, unlabelled),
            normalize_extension(condition),
        )
        if not self.condition or (image and SampleMembers(condition=self.condition).is_map(image.lower().lstrip("."))):
            raise ValueError(
                f"condition={condition} and image={image}: give the ending of a map, and another of its image"
            )
        super().__init__(
            image_size,
            seed,
            root=root,
            train=train,
            validation=validation,
            train_images=train_images,
            validation_images=validation_images,
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
            max_unreadable=max_unreadable,
        )

    @staticmethod
    def condition_reader(maps: MapKind = "rgb", labels: int = 0, unlabelled: int | None = None) -> MapDecoder:
        """Return what reads a map that lies in no shard; see `vqf.protocols.Data`."""
        return MapDecoder(maps, labels, unlabelled)

    def check_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Refuse shards whose maps are others than the options say.

        Raises:
            UserError: With the options that are right.
        """
        written = _parse_map_decoder(manifest.get("maps"))
        if written in (None, self.map_decoder):
            return
        words = " ".join(f"data.{key}={'null' if value is None else value}" for key, value in written.options.items())
        raise UserError(
            f"data.maps={self.map_decoder.kind}: {MANIFEST_NAME} says how the maps of these shards are read: {words}"
        )

    def indexed_split(self, name: str, part: IndexedShards, labels: torch.Tensor | None) -> "ShardPairSplit":
        """Return a part whose shards are in a folder.

        Raises:
            UserError: If too many of its images have no map.
        """
        alone = (
            ((part.map_locations[:, 2] == CRC_MISSING) & (part.locations[:, 2] != CRC_MISSING)).nonzero()[0].tolist()
        )
        if alone:
            what = f"{len(alone)} of the {len(part.names)} {name} images have no map: "
            what += f"{quote_name(part.names[alone[0]])} "
            what += f"has no .{self.condition} and no .{self.condition}.* beside it"
            if len(alone) > allowed_unreadable(self.max_unreadable, len(part.names)) or len(alone) == len(part.names):
                raise UserError(f"data.condition={self.condition}: {what}")
            log.warning(f"data.condition={self.condition}: {what}; other pairs take their places")
        return ShardPairSplit(self, name, part, labels)

    def streamed_split(self, name: str, stream: StreamedShards) -> "StreamPairSplit":
        """Return a part whose shards are not."""
        return StreamPairSplit(self, name, stream)


class ShardPairSplit(PairedImageSplit, ShardSplit):
    """The pairs of the shards of a part."""

    def __init__(self, data: ShardPairs, name: str, part: IndexedShards, labels: torch.Tensor | None) -> None:
        self.map_decoder, self.map_names, self.map_locations = data.map_decoder, part.map_names, part.map_locations
        more = [astuple(data.map_decoder), *content_key(part.map_names, part.map_locations)]
        super().__init__(data, name, part, labels, more)

    def open_map(self, index: int) -> IO[bytes]:
        """Return the bytes of a map."""
        return self.read_member(index, self.map_locations)


class StreamPairSplit(StreamSplit):
    """The pairs of shards that are read from end to end."""

    def __init__(self, data: ShardPairs, part: str, stream: StreamedShards) -> None:
        self.map_decoder, self.condition = data.map_decoder, data.condition
        super().__init__(data, part, stream)

    def file(self, raw: RawSample, name: str) -> PairFile:
        """Return a pair as the files that it is."""
        file = super().file(raw, name)
        return PairFile(
            **vars(file), map_decoder=self.map_decoder, map_name=raw.map_name, open_map=lambda: _open_raw_map(raw)
        )

    def decode(self, raw: RawSample, view: ViewParams) -> CroppedImage:
        """See `StreamSplit`."""
        shown = super().decode(raw, view)
        turn, most = self.map_decoder.decode, self.data.max_pixels
        whole = decode_matching_map(shown.shape, lambda: _open_raw_map(raw), raw.map_name, turn, most)
        return stack_map(shown, whole, self.data.size, self.map_decoder)

    def _decode_sample(self, raw: RawSample, view: ViewParams) -> Sample | None:
        sample = super()._decode_sample(raw, view)
        return None if sample is None else unstack_map(sample, self.map_decoder)

    def fingerprint_fields(self, stream: StreamedShards) -> list[object]:
        """See `StreamSplit`."""
        return [*super().fingerprint_fields(stream), astuple(self.map_decoder), self.condition]


def _parse_map_decoder(said: Any) -> MapDecoder | None:
    """Return how a manifest, which anybody may have written, says that maps are read; None if it says nothing."""
    match said:
        case {"maps": "rgb" | "grey" | "palette" as kind}:
            return MapDecoder(kind)
        case {"maps": "labels", "labels": int(labels)} if labels > 1:
            unlabelled = said.get("unlabelled")
            return MapDecoder("labels", labels, unlabelled if isinstance(unlabelled, int) else None)
    return None


def _open_raw_map(raw: RawSample) -> IO[bytes]:
    if not raw.map_name:
        raise UnreadableError("no map")
    return io.BytesIO(raw.map_content)

"""Images with condition maps in tar shards."""

import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Any

import torch

from vqf.batch import Sample, Size
from vqf.data.files.image_file import PairFile, decode_matching_map
from vqf.data.files.pair_dataset import PairedImageSplit, stack_map, unstack_map
from vqf.data.files.read_errors import allowed_unreadable
from vqf.data.images.augment import ViewParams
from vqf.data.images.decode import CroppedImage, UnreadableError
from vqf.data.images.maps import MapDecoder, MapKind
from vqf.data.images.pixel_values import PixelRange, check_range
from vqf.data.shards import Shards, normalize_extension
from vqf.data.tar.contents import CRC_MISSING, IndexedShards
from vqf.data.tar.dataset import ShardSplit, content_key
from vqf.data.tar.manifest import MANIFEST_NAME
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.remote import StreamedShards
from vqf.data.tar.remote_io import RawSample
from vqf.data.tar.streaming import StreamSplit
from vqf.errors import UserError, quote_name
from vqf.options.ranges import AnyLabel, NonNegativeInt
from vqf.registry import register

log = logging.getLogger("vqf")


@register("data", "shard_pairs")
class ShardPairs(Shards):
    """Images in tar shards, each with an aligned condition map beside it: `Sample.condition` (C, H, W).

    The map of `0001.jpg` is `0001.condition.png` of the same shard. Maps are read as in `data=pairs`, shards as in
    `data=shards`. An image without a readable map is unreadable.

    Args:
        image: Extension of the image; by default the first that is an image format, and no map.
        condition: Extension of the map: `png`, or `depth` for `0001.depth.png`, `0001.depth.tif` and so on.
        maps: What a map holds. `rgb` and `grey`: an image of 3 channels or 1, resized like images. `palette`: an image
            of 3 channels whose colors are codes, resized without mixing them. `labels`: a class number per pixel,
            one-hot encoded into `labels` channels. Must be what the manifest of pipeline=shard says, if there is one.
        labels: Number of classes of maps=labels, at least 2.
        unlabelled: The number of pixels without a class. It becomes class 0, and every other number moves up by one.
        map_range: The values that become black and white in gray maps of more than 8 bits, as `range` for images.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        image: str | None = None,
        condition: str = "condition",
        maps: MapKind = "rgb",
        labels: NonNegativeInt = 0,
        unlabelled: AnyLabel | None = None,
        map_range: PixelRange | None = None,
        **options: Any,
    ) -> None:
        self.map_decoder = self.condition_reader(maps, labels, unlabelled, map_range)
        self.condition = normalize_extension(condition)
        if not self.condition or (image and SampleMembers(condition=self.condition).is_map(image.lower().lstrip("."))):
            raise ValueError(
                f"condition={condition} and image={image}: give the extension of the map, and another one of its image"
            )
        super().__init__(image_size, seed, image=image, **options)  # labels of images stay on, unlike in `data=pairs`

    @staticmethod
    def condition_reader(
        maps: MapKind = "rgb",
        labels: int = 0,
        unlabelled: int | None = None,
        map_range: PixelRange | None = None,
    ) -> MapDecoder:
        return MapDecoder(maps, labels, unlabelled, check_range("map_range", map_range))

    def check_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Check the maps' options in a manifest.

        Raises:
            UserError: If they differ.
        """
        written = _parse_map_decoder(manifest.get("maps"))
        if written in (None, replace(self.map_decoder, pixel_range=None)):
            return
        options = " ".join(f"data.{key}={'null' if value is None else value}" for key, value in written.options.items())
        raise UserError(
            f"data.maps={self.map_decoder.kind}: the maps of these shards were written for other options, says "
            f"{MANIFEST_NAME}; give {options}"
        )

    def indexed_split(self, name: str, contents: IndexedShards, labels: torch.Tensor | None) -> "ShardPairSplit":
        """Build the split of shards in a folder.

        Raises:
            UserError: If too many maps are missing.
        """
        self._check_unpaired(name, contents)
        return ShardPairSplit(self, name, contents, labels)

    def streamed_split(self, name: str, stream: StreamedShards) -> "StreamPairSplit":
        return StreamPairSplit(self, name, stream)

    def _check_unpaired(self, split_name: str, contents: IndexedShards) -> None:
        no_map = contents.map_locations[:, 2] == CRC_MISSING
        has_image = contents.locations[:, 2] != CRC_MISSING
        unpaired = (no_map & has_image).nonzero()[0].tolist()
        if not unpaired:
            return
        count, total = len(unpaired), len(contents.names)
        problem = (
            f"{count} of the {total} {split_name} images have no map: {quote_name(contents.names[unpaired[0]])} "
            f"has no .{self.condition} and no .{self.condition}.* beside it"
        )
        if count > allowed_unreadable(self.max_unreadable, total) or count == total:
            raise UserError(f"data.condition={self.condition}: {problem}")
        log.warning(f"data.condition={self.condition}: {problem}; the next pairs take their places")


class ShardPairSplit(PairedImageSplit, ShardSplit):
    """Training or validation pairs of indexed shards."""

    def __init__(self, data: ShardPairs, name: str, contents: IndexedShards, labels: torch.Tensor | None) -> None:
        self.map_decoder = data.map_decoder
        self.map_names, self.map_locations = contents.map_names, contents.map_locations
        extra = [data.map_decoder.fingerprint_fields, *content_key(contents.map_names, contents.map_locations)]
        super().__init__(data, name, contents, labels, extra)

    def open_map(self, index: int) -> IO[bytes]:
        return self.read_member(index, self.map_locations)


class StreamPairSplit(StreamSplit):
    """Training or validation pairs of streamed shards."""

    def __init__(self, data: ShardPairs, split_name: str, stream: StreamedShards) -> None:
        self.map_decoder, self.condition = data.map_decoder, data.condition
        super().__init__(data, split_name, stream)

    def file(self, raw: RawSample, name: str) -> PairFile:
        file = super().file(raw, name)
        return PairFile(
            **vars(file), map_decoder=self.map_decoder, map_name=raw.map_name, open_map=lambda: _open_raw_map(raw)
        )

    def decode(self, raw: RawSample, view: ViewParams) -> CroppedImage:
        crop = super().decode(raw, view)
        full_map = decode_matching_map(
            crop.shape, lambda: _open_raw_map(raw), raw.map_name, self.map_decoder.decode, self.data.max_pixels
        )
        return stack_map(crop, full_map, self.data.size, self.map_decoder)

    def fingerprint_fields(self, stream: StreamedShards) -> list[object]:
        return [*super().fingerprint_fields(stream), self.map_decoder.fingerprint_fields, self.condition]

    def _decode_sample(self, raw: RawSample, view: ViewParams) -> Sample | None:
        sample = super()._decode_sample(raw, view)
        return None if sample is None else unstack_map(sample, self.map_decoder)


def _parse_map_decoder(entry: Any) -> MapDecoder | None:
    match entry:
        case {"maps": "rgb" | "grey" | "palette" as kind}:
            return MapDecoder(kind)
        case {"maps": "labels", "labels": int(labels)} if labels > 1:
            unlabelled = entry.get("unlabelled")
            return MapDecoder("labels", labels, unlabelled if isinstance(unlabelled, int) else None)
    return None


def _open_raw_map(raw: RawSample) -> IO[bytes]:
    if not raw.map_name:
        raise UnreadableError("no map")
    return io.BytesIO(raw.map_content)

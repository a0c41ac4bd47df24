"""Options of `data=shard_pairs` for the maps of a source."""

from collections.abc import Collection
from functools import partial
from typing import Any

from omegaconf import DictConfig

from vqf.dataloading.image_files import ImageFileLike, PairFileLike, StreamedShardSplit, flatten_sources
from vqf.errors import UserError
from vqf.images import condition_reader
from vqf.pipelines.shards.rendered_file import RenderedPairFile, as_image_file
from vqf.pipelines.shards.writer import ImageFormat, ReadFailure, try_read
from vqf.protocols import ConditionReader, Split, StoredInShards

MAP_KIND_BY_CHANNELS = {1: "grey", 3: "rgb"}
IMAGES_ONLY_HINT = "images_only=true writes the images alone"


def map_options(data: DictConfig, splits: Collection[Split], format: ImageFormat) -> dict[str, Any] | None:
    """Return the options that read the maps of a data source from its shards; None without maps.

    Args:
        format: Format of the images; maps are PNG, or copied with "original".

    Raises:
        UserError: If maps are of several kinds, or unsupported.
    """
    sources = [source for split in splits for _, source in flatten_sources(split)]
    mapped = [source for source in sources if has_maps(source)]
    if not mapped:
        return None
    if len(mapped) < len(sources):
        raise UserError(f"data '{data.name}' has maps in only some of its sources; {IMAGES_ONLY_HINT}")
    try:
        reader = condition_reader(data)
    except ValueError as error:
        raise UserError(f"{error}; {IMAGES_ONLY_HINT}") from error
    stored = reader.options if isinstance(reader, StoredInShards) else None
    options = dict(stored or _options_by_channels(data.name, reader, mapped))
    return options if format == "original" or options["maps"] != "labels" else _png_options(options)


def _png_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of class maps as PNG: unlabelled pixels are class 0, the others one higher."""
    if options["labels"] > 2**16:
        raise UserError(
            f"data.labels={options['labels']}: a PNG holds numbers below 65536; format=original, or {IMAGES_ONLY_HINT}"
        )
    return {**options, "unlabelled": None}


def _options_by_channels(name: str, reader: ConditionReader | None, mapped: Collection[Split]) -> dict[str, Any]:
    if reader is not None and reader.num_classes:
        return {"maps": "labels", "labels": reader.num_classes, "unlabelled": None}
    channels = {_map_channels(source) for source in mapped}
    if len(channels) > 1 or not channels <= MAP_KIND_BY_CHANNELS.keys():
        raise UserError(
            f"data '{name}' has maps of {' and '.join(map(str, sorted(channels)))} channels, and no function "
            f"condition_reader says what they are (vqf.protocols.Data); {IMAGES_ONLY_HINT}"
        )
    return {"maps": MAP_KIND_BY_CHANNELS[channels.pop()]}


def has_maps(split: Split) -> bool:
    """Tell whether the first readable image has a condition map."""
    if isinstance(split, StreamedShardSplit):
        return getattr(split, "map_decoder", None) is not None
    return isinstance(_first_readable(split), PairFileLike)


def _first_readable(split: Split) -> ImageFileLike | None:
    files = (try_read(partial(as_image_file, split, index)) for index in range(len(split)))
    return next((file for file in files if not isinstance(file, ReadFailure)), None)


def _map_channels(split: Split) -> int:
    file = _first_readable(split)
    condition = file.sample.condition if isinstance(file, RenderedPairFile) else split.item(0, 0).condition
    return 0 if condition is None else len(condition)

"""What the maps of a source are, in words that shards of them keep."""

from collections.abc import Collection
from functools import partial
from typing import Any

from omegaconf import DictConfig

from vqf.dataloading.image_files import PairFile, PictureFile, Streams, sources_of
from vqf.errors import UserError
from vqf.images import condition_reader
from vqf.pipelines.shards.rendered_file import DrawnPair, file_of
from vqf.pipelines.shards.writer import Format, Unreadable, attempt
from vqf.protocols import ConditionReader, Split

BY_CHANNELS = {1: "grey", 3: "rgb"}
ALONE = "pictures_alone=true writes the pictures alone"


def options_of_maps(data: DictConfig, parts: Collection[Split], format: Format) -> dict[str, Any] | None:
    """Return the options of `data=shard_pairs` that read the maps of a source once they are in shards; None for none.

    Args:
        data: The node of the source.
        parts: Its pictures.
        format: In which they are written: maps are PNG in all but "original".

    Raises:
        UserError: If there are maps of several kinds, or such as no option reads.
    """
    sources = [each for split in parts for _, each in sources_of(split)]
    mapped = [each for each in sources if has_maps(each)]
    if not mapped:
        return None
    if len(mapped) < len(sources):
        raise UserError(f"data '{data.name}' has maps in some of its sources alone; {ALONE}")
    try:
        reader = condition_reader(data)
    except ValueError as error:
        raise UserError(f"{error}; {ALONE}") from error
    options = dict(getattr(reader, "options", None) or _by_channels(data.name, reader, mapped))
    return options if format == "original" or options["maps"] != "labels" else _as_png(options)


def _as_png(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that read labels once what stands for none is class 0, with all others moved up."""
    if options["labels"] > 2**16:
        raise UserError(
            f"data.labels={options['labels']}: a PNG holds numbers below 65536; format=original, or {ALONE}"
        )
    return {**options, "unlabelled": None}


def _by_channels(name: str, reader: ConditionReader | None, mapped: Collection[Split]) -> dict[str, Any]:
    if reader is not None and reader.classes:
        return {"maps": "labels", "labels": reader.classes, "unlabelled": None}
    channels = {_channels(each) for each in mapped}
    if len(channels) > 1 or not channels <= BY_CHANNELS.keys():
        raise UserError(
            f"data '{name}' has maps of {' and '.join(map(str, sorted(channels)))} channels, and no function "
            f"condition_reader says what they are (vqf.protocols.Data); {ALONE}"
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


def _channels(split: Split) -> int:
    file = _first(split)
    condition = file.sample.condition if isinstance(file, DrawnPair) else split.item(0, 0).condition
    return 0 if condition is None else len(condition)

"""Protocols of splits whose images are files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

from vqf.batch import Size
from vqf.errors import UserError
from vqf.protocols import Named, Split


class ImageFileLike(Protocol):
    """An image file; methods raise a ValueError or an OSError if it cannot be read."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> int | None: ...

    def read_bytes(self) -> bytes: ...

    def load_image(self) -> Image.Image: ...  # uncropped, upright, RGB

    # Format, mode, width, height, and the least and largest pixel value.
    def probe(self, content: bytes) -> tuple[str, str, int, int, float, float]: ...


@runtime_checkable
class PairFileLike(ImageFileLike, Protocol):
    """An image file with a condition map."""

    def read_map(self) -> tuple[bytes, str]: ...  # content and format of the file

    # Uncropped, upright, in a mode that PNG can store; `shape` is the height and width of the image.
    def load_map(self, shape: Size) -> Image.Image: ...


@runtime_checkable
class ImageFileSplit(Protocol):
    """A split with random access to its image files."""

    names: Sequence[str]

    def file(self, index: int) -> ImageFileLike: ...


@runtime_checkable
class ConcatSplit(Protocol):
    """A concatenation of splits; labels are those of the sources."""

    source_names: Sequence[str]
    source_labels: Sequence[int]
    splits: Sequence[Split]

    def locate(self, index: int) -> tuple[int, int]: ...  # number of the source, index in it


@runtime_checkable
class StreamedShardSplit(Protocol):
    """A split of tar shards that are read sequentially."""

    urls: Sequence[str]

    @property
    def broken_shard_limit(self) -> int: ...  # shards that may be missing or broken

    def display_url(self, shard: int) -> str: ...  # without secrets

    def iter_files(self, shard: int) -> Iterator[ImageFileLike]: ...  # raises a ValueError where the shard breaks off


class SampleLocation(NamedTuple):
    """The innermost split of an image, and its index there."""

    split: Split
    local_index: int
    name: str  # contains no absolute path
    source_label: int | None = None  # replaces the label of the image


def locate(split: Split, index: int) -> SampleLocation:
    """Resolve an index through any concatenations."""
    if isinstance(split, ConcatSplit):
        source, local_index = split.locate(index)
        location = locate(split.splits[source], local_index)
        name = f"{split.source_names[source]}/{location.name}"
        return location._replace(name=name, source_label=split.source_labels[source])
    name = str(split.names[index]) if isinstance(split, Named) else str(index)
    return SampleLocation(split, index, Path(name).name if os.path.isabs(name) else name)


def flatten_sources(split: Split, option: str = "data") -> list[tuple[str, Split]]:
    """Return the innermost splits, each with its config key."""
    if not isinstance(split, ConcatSplit):
        return [(option, split)]
    sources = zip(split.source_names, split.splits, strict=True)
    return [pair for name, source in sources for pair in flatten_sources(source, f"{option}.parts.{name}")]


def use_image_folder(config: DictConfig, folder: str, **options: Any) -> None:
    """Make the images of a folder, all of them for validation, the data of a config; `data.range` stays.

    Args:
        options: Others of `data=folder`.

    Raises:
        UserError: If there is no such folder; the option of the pipelines is `images`.
    """
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"images={folder}: no such folder; give a folder of images")
    pixel_range = config.data.get("range") if config.data else None
    node = {"name": "folder", "root": folder, "validation_fraction": 1.0, "range": pixel_range, **options}
    with open_dict(config):
        config.target, config.data = "image", OmegaConf.create(node)

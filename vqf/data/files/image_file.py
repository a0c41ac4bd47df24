"""A picture of a source as the file that it is, for what copies, checks or crops files: none in place of another."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from PIL import Image

from vqf.batch import Size
from vqf.data.images.decode import Animated, UnreadableError, format_of, open_picture, to_rgb
from vqf.data.images.maps import Reading
from vqf.errors import quoted

Open = Callable[[], Path | IO[bytes]]  # raises an UnreadableError where there is nothing, or not what there was


class Limits(Protocol):
    """What a source refuses to decode."""

    animated: Animated
    max_pixels: int


class Facts(NamedTuple):
    """What a file turned out to hold; the size is that of the upright picture."""

    format: str
    mode: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureFile:
    """One picture. All that its methods raise is an UnreadableError."""

    limits: Limits
    name: str
    label: int | None
    open: Open

    def stored(self) -> bytes:
        """Return the bytes of the file."""
        return content_of(self.open)

    def picture(self) -> Image.Image:
        """Return the whole picture, upright and in RGB."""
        return to_rgb(self._decoded(self.open()))

    def facts(self, content: bytes) -> Facts:
        """Decode what `stored` returned, and say what it is."""
        image = self._decoded(io.BytesIO(content))
        to_rgb(image)
        return Facts(image.format or "?", image.mode, *image.size)

    def _decoded(self, source: Path | IO[bytes]) -> Image.Image:
        return open_picture(source, max_pixels=self.limits.max_pixels, animated=self.limits.animated)


@dataclass(frozen=True)
class PairFile(PictureFile):
    """A picture and its map."""

    reading: Reading
    map_name: str
    open_map: Open

    def facts(self, content: bytes) -> Facts:
        """See above; the map is looked at, too."""
        facts = super().facts(content)
        self.understood((facts.height, facts.width))
        return facts

    def stored_map(self) -> tuple[bytes, str]:
        """Return the bytes of the map's file, and its format."""
        content = content_of(self.open_map)
        return content, format_of(content)

    def understood(self, shape: Size) -> Image.Image:
        """Return the map of a picture of so many rows and columns: see `Reading.understood`."""
        return map_of(shape, self.open_map, self.map_name, self.reading.understood, self.limits.max_pixels)

    def map(self, shape: Size) -> Image.Image:
        """Return it in a mode that PNG keeps: see `Reading.plain`."""
        return map_of(shape, self.open_map, self.map_name, self.reading.plain, self.limits.max_pixels)


def map_of(
    shape: Size, open: Open, name: str, turn: Callable[[Image.Image], Image.Image], max_pixels: int
) -> Image.Image:
    """Return the map of a picture of so many rows and columns.

    Args:
        shape: Of the picture.
        open: Opens the map.
        name: Of the map; empty where there is none.
        turn: Makes of what is in the file what it means.
        max_pixels: The most that is decoded.

    Raises:
        UnreadableError: If there is none that could be trained on, or it has another shape.
    """
    try:
        found = turn(open_picture(open(), max_pixels=max_pixels))
    except UnreadableError as error:
        raise UnreadableError(f"its map {quoted(name)}: {error}" if name else str(error)) from error
    rows, columns = shape
    if abs(found.width * rows - found.height * columns) > max(*found.size, *shape):  # beyond rounding
        shapes = f"{found.width} x {found.height} and {columns} x {rows}"
        raise UnreadableError(f"its map {quoted(name)} has another shape: {shapes}")
    return found


def content_of(open: Open) -> bytes:
    """Return the bytes of a file.

    Raises:
        UnreadableError: If they cannot be had.
    """
    source = open()
    try:
        return source.read_bytes() if isinstance(source, Path) else source.read()
    except OSError as error:
        raise UnreadableError((error.strerror or type(error).__name__).lower()) from error

"""An image of a source as the file that it is, for what copies, checks or crops files: none in place of another."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from PIL import Image

from vqf.batch import Size
from vqf.data.images.decode import Animated, UnreadableError, image_format, open_image, to_rgb
from vqf.data.images.maps import MapDecoder
from vqf.errors import quote_name

Opener = Callable[[], Path | IO[bytes]]  # raises an UnreadableError where there is nothing, or not what there was


class DecodeLimits(Protocol):
    """What a source refuses to decode."""

    animated: Animated
    max_pixels: int


class ImageInfo(NamedTuple):
    """What a file turned out to hold; the size is that of the upright image."""

    format: str
    mode: str
    width: int
    height: int


@dataclass(frozen=True)
class ImageFile:
    """One image. All that its methods raise is an UnreadableError."""

    limits: DecodeLimits
    name: str
    label: int | None
    open: Opener

    def read_bytes(self) -> bytes:
        """Return the bytes of the file."""
        return read_content(self.open)

    def load_image(self) -> Image.Image:
        """Return the whole image, upright and in RGB."""
        return to_rgb(self._decode(self.open()))

    def probe(self, content: bytes) -> ImageInfo:
        """Decode what `read_bytes` returned, and say what it is."""
        image = self._decode(io.BytesIO(content))
        to_rgb(image)
        return ImageInfo(image.format or "?", image.mode, *image.size)

    def _decode(self, source: Path | IO[bytes]) -> Image.Image:
        return open_image(source, max_pixels=self.limits.max_pixels, animated=self.limits.animated)


@dataclass(frozen=True)
class PairFile(ImageFile):
    """An image and its map."""

    map_decoder: MapDecoder
    map_name: str
    open_map: Opener

    def probe(self, content: bytes) -> ImageInfo:
        """See above; the map is looked at, too."""
        facts = super().probe(content)
        self.decode_map((facts.height, facts.width))
        return facts

    def read_map(self) -> tuple[bytes, str]:
        """Return the bytes of the map's file, and its format."""
        content = read_content(self.open_map)
        return content, image_format(content)

    def decode_map(self, shape: Size) -> Image.Image:
        """Return the map of an image of so many rows and columns: see `MapDecoder.decode`."""
        return decode_matching_map(shape, self.open_map, self.map_name, self.map_decoder.decode, self.limits.max_pixels)

    def load_map(self, shape: Size) -> Image.Image:
        """Return it in a mode that PNG keeps: see `MapDecoder.to_png`."""
        return decode_matching_map(shape, self.open_map, self.map_name, self.map_decoder.to_png, self.limits.max_pixels)


def decode_matching_map(
    shape: Size, opener: Opener, name: str, convert: Callable[[Image.Image], Image.Image], max_pixels: int
) -> Image.Image:
    """Return the map of an image of so many rows and columns.

    Args:
        shape: Of the image.
        opener: Opens the map.
        name: Of the map; empty where there is none.
        convert: Makes of what is in the file what it means.
        max_pixels: The most that is decoded.

    Raises:
        UnreadableError: If there is none that could be trained on, or it has another shape.
    """
    try:
        found = convert(open_image(opener(), max_pixels=max_pixels))
    except UnreadableError as error:
        raise UnreadableError(f"its map {quote_name(name)}: {error}" if name else str(error)) from error
    rows, columns = shape
    if abs(found.width * rows - found.height * columns) > max(*found.size, *shape):  # beyond rounding
        shapes = f"{found.width} x {found.height} and {columns} x {rows}"
        raise UnreadableError(f"its map {quote_name(name)} has another shape: {shapes}")
    return found


def read_content(opener: Opener) -> bytes:
    """Return the bytes of a file.

    Raises:
        UnreadableError: If they cannot be had.
    """
    source = opener()
    try:
        return source.read_bytes() if isinstance(source, Path) else source.read()
    except OSError as error:
        raise UnreadableError((error.strerror or type(error).__name__).lower()) from error

"""Original files of images."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from PIL import Image

from vqf.batch import Size
from vqf.data.images.decode import Animated, UnreadableError, image_format, open_image, to_rgb
from vqf.data.images.maps import MapDecoder
from vqf.data.images.pixel_values import PixelRange, is_deep, limits_of
from vqf.errors import quote_name
from vqf.file_kinds import check_regular

Opener = Callable[[], Path | IO[bytes]]  # raises UnreadableError if the file is missing or has changed


class DecodeLimits(Protocol):
    """What a source refuses to decode."""

    animated: Animated
    max_pixels: int
    pixel_range: PixelRange | None


class ImageInfo(NamedTuple):
    """Format, mode and upright size of a decoded file, with its least and largest value."""

    format: str
    mode: str
    width: int
    height: int
    least: float
    largest: float


@dataclass(frozen=True)
class ImageFile:
    """An image file whose methods raise only UnreadableError."""

    limits: DecodeLimits
    name: str
    label: int | None
    open: Opener

    def read_bytes(self) -> bytes:
        return read_content(self.open)

    def load_image(self) -> Image.Image:
        """Decode the full image, upright, RGB."""
        return to_rgb(self._decode(self.open()), self.limits.pixel_range)

    def probe(self, content: bytes) -> ImageInfo:
        """Decode and describe the bytes of `read_bytes`."""
        image = self._decode(io.BytesIO(content))
        rgb = to_rgb(image, self.limits.pixel_range)
        return ImageInfo(image.format or "?", image.mode, *image.size, *limits_of(image if is_deep(image) else rgb))

    def _decode(self, source: Path | IO[bytes]) -> Image.Image:
        return open_image(source, max_pixels=self.limits.max_pixels, animated=self.limits.animated)


@dataclass(frozen=True)
class PairFile(ImageFile):
    """The files of an image and its condition map."""

    map_decoder: MapDecoder
    map_name: str
    open_map: Opener

    def probe(self, content: bytes) -> ImageInfo:
        info = super().probe(content)
        self.decode_map((info.height, info.width))
        return info

    def read_map(self) -> tuple[bytes, str]:
        """Return the bytes of the map's file, and its format."""
        content = read_content(self.open_map)
        return content, image_format(content)

    def decode_map(self, shape: Size) -> Image.Image:
        return decode_matching_map(shape, self.open_map, self.map_name, self.map_decoder.decode, self.limits.max_pixels)

    def load_map(self, shape: Size) -> Image.Image:
        return decode_matching_map(shape, self.open_map, self.map_name, self.map_decoder.to_png, self.limits.max_pixels)


def decode_matching_map(
    shape: Size, opener: Opener, name: str, convert: Callable[[Image.Image], Image.Image], max_pixels: int
) -> Image.Image:
    """Decode a condition map with `convert` for an image of `shape` (H, W).

    Raises:
        UnreadableError: If the map is missing, broken, or of another aspect ratio.
    """
    try:
        decoded = convert(open_image(opener(), max_pixels=max_pixels))
    except UnreadableError as error:
        raise UnreadableError(f"its map {quote_name(name)}: {error}" if name else str(error)) from error
    rows, columns = shape
    # A map at another scale may be off by the rounding of one of its sides.
    if abs(decoded.width * rows - decoded.height * columns) > max(*decoded.size, *shape):
        sizes = f"{decoded.width} x {decoded.height} and {columns} x {rows}"
        raise UnreadableError(f"its map {quote_name(name)} has another shape: {sizes}")
    return decoded


def read_content(opener: Opener) -> bytes:
    """Read all bytes of a file.

    Raises:
        UnreadableError: If it cannot be read.
    """
    source = opener()
    try:
        if isinstance(source, Path):
            check_regular(source)
        return source.read_bytes() if isinstance(source, Path) else source.read()
    except OSError as error:
        raise UnreadableError((error.strerror or type(error).__name__).lower()) from error

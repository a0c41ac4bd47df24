"""Image files of pipelines."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from omegaconf import DictConfig
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vqf.atomic import atomic_path
from vqf.errors import UserError
from vqf.protocols import ConditionReader
from vqf.registry import call_static, find_component

log = logging.getLogger("vqf")


def to_pil_image(image: Tensor) -> Image.Image:
    """Convert an image (C, H, W) in [-1, 1] to 8 bits, in the colors of `to_rgb`."""
    levels = to_rgb(image[None])[0].float().clamp(-1, 1).add_(1).mul_(127.5).round_()  # one copy: images may be large
    pixels = levels.to("cpu", torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


def to_rgb(images: Tensor, is_class_map: bool | None = None) -> Tensor:
    """Convert images (B, C, H, W) to colors (B, 3, H, W) in [-1, 1]. One channel is gray.

    Args:
        is_class_map: Whether the channels are classes, or logits of classes: the best gives the color. By default two
            channels are, or more than three.
    """
    if is_class_map is None:
        is_class_map = images.shape[1] not in (1, 3)
    if not is_class_map:
        return images.expand(-1, 3, -1, -1)
    # Steps of the golden ratio around the circle of hues: neighboring class numbers get very different colors.
    hues = torch.arange(images.shape[1], device=images.device) * 0.618034 % 1
    palette = ((hues[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], device=hues.device)) % 6 - 3).abs() - 1
    return rearrange(palette.clamp(0, 1)[images.argmax(1)] * 2 - 1, "b h w c -> b c h w")


def read_image(path: Path, value_range: Sequence[float] | None = None) -> Tensor:
    """Read a full image, (3, H, W) in [-1, 1], with the decoder of `data=folder`.

    Args:
        value_range: The option `data.range`.

    Raises:
        UserError: If the file is not a readable image.
    """
    return _read_or_raise(find_component("data", "folder").target.image_reader(value_range), path)  # type: ignore[attr-defined]


def condition_reader(data: DictConfig) -> ConditionReader | None:
    """The reader of condition maps of a data source, or None.

    Raises:
        UserError: If the source has maps of several kinds.
    """
    try:
        reader: ConditionReader | None = call_static("data", data, "condition_reader")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return reader


def condition_map_reader(data: DictConfig) -> Callable[[Path], Tensor]:
    """Make `condition_reader` a function from path to map (C, H, W) that raises UserError.

    Raises:
        UserError: If the data source has none.
    """
    reader = condition_reader(data)
    if reader is None:
        raise UserError(
            f"condition: data '{data.name}' does not say how it reads a map from a file; give its class a function "
            "condition_reader (vqf.protocols.Data), or leave condition out to sample from validation maps"
        )
    return lambda path: _read_or_raise(reader, path)


def image_files(path: Path) -> list[Path]:
    """List the images of a folder by name, or one file.

    Raises:
        UserError: If there is none.
    """
    if not path.exists():
        raise UserError(f"condition={path}: no such file or folder")
    if not path.is_dir():
        return [path]
    extensions: tuple[str, ...] = tuple(find_component("data", "folder").options["extensions"].default)
    files = [file for file in path.iterdir() if not file.is_dir()]
    # What is no file, such as a named pipe, is an image that cannot be read: it is named, not left out.
    images = sorted(file for file in files if file.name.lower().endswith(extensions) and not file.name.startswith("."))
    if not images:
        raise UserError(f"condition={path}: no images ({', '.join(extensions)}) in this folder")
    if others := sorted(file.name for file in files if file not in images):
        log.info(f"condition={path}: {len(others)} files are no images by their endings, such as '{others[0]}'")
    return images


def save_images(images: Iterable[Tensor], folder: Path, names: Iterable[str]) -> None:
    """Write images (C, H, W) to FOLDER/NAME.png."""
    for image, name in zip(images, names, strict=True):
        save_image(image, folder / f"{name}.png")


def save_image(image: Tensor, path: Path, png_info: PngInfo | None = None) -> None:
    """Write an image (C, H, W) as PNG, atomically."""
    with atomic_path(path, durable=False) as temporary:
        to_pil_image(image).save(temporary, format="PNG", pnginfo=png_info)


def _read_or_raise(reader: Callable[[Path], Tensor], path: Path) -> Tensor:
    try:
        return reader(path)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not a readable image ({error})") from error

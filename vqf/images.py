"""Images in and out of files, for pipelines. How a file is read is for the data sources to say."""

from collections.abc import Callable, Iterable
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


def to_pil_image(image: Tensor) -> Image.Image:
    """Turn an image (C, H, W) in [-1, 1] into an 8-bit one, rounded to the nearest; see `to_rgb`."""
    pixels = ((to_rgb(image[None])[0].float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


def to_rgb(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) of any channels in colours, (B, 3, H, W) in [-1, 1].

    One channel is grey. Two, or more than three, are the scores of classes, of which the best is shown in a colour of
    its own.
    """
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 3:
        return images
    # Steps of the golden ratio around the circle of hues: neighbours in number are far apart in colour.
    hues = torch.arange(images.shape[1], device=images.device) * 0.618034 % 1
    palette = ((hues[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], device=hues.device)) % 6 - 3).abs() - 1
    return rearrange(palette.clamp(0, 1)[images.argmax(1)] * 2 - 1, "b h w c -> b c h w")


def read_image(path: Path) -> Tensor:
    """Read an image whole, (3, H, W) in [-1, 1], as `data=folder` reads its own.

    Raises:
        UserError: If there is none that can be read.
    """
    return _read_or_raise(find_component("data", "folder").target.image_reader(), path)  # type: ignore[attr-defined]


def condition_reader(data: DictConfig) -> ConditionReader | None:
    """Return what reads maps from files as a data source reads its own; None if it says nothing of that.

    Args:
        data: Its node, as a run was trained with.

    Raises:
        UserError: If it has maps of several kinds.
    """
    try:
        reader: ConditionReader | None = call_static("data", data, "condition_reader")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return reader


def condition_map_reader(data: DictConfig) -> Callable[[Path], Tensor]:
    """Return `condition_reader`, whose mistakes are the user's.

    Raises:
        UserError: If the data source says nothing of how a file becomes a map.
    """
    reader = condition_reader(data)
    if reader is None:
        raise UserError(
            f"condition: data '{data.name}' does not say how it reads a map from a file; give its class a function "
            "condition_reader (vqf.protocols.Data), or leave condition out to draw by held-out maps"
        )
    return lambda path: _read_or_raise(reader, path)


def image_files(path: Path) -> list[Path]:
    """List the images of a folder, by name, or the file itself; hidden files and what ends otherwise are left out.

    Raises:
        UserError: If there is none.
    """
    if not path.exists():
        raise UserError(f"condition={path}: no such file or folder")
    if not path.is_dir():
        return [path]
    endings: tuple[str, ...] = tuple(find_component("data", "folder").options["extensions"].default)
    files = [each for each in path.iterdir() if each.is_file() and not each.name.startswith(".")]
    found = sorted(each for each in files if each.name.lower().endswith(endings))
    if not found:
        raise UserError(f"condition={path}: no images ({', '.join(endings)}) in this folder")
    return found


def save_images(images: Iterable[Tensor], folder: Path, names: Iterable[str]) -> None:
    """Write images (C, H, W) as PNG files of the given names into a folder."""
    for image, name in zip(images, names, strict=True):
        save_image(image, folder / f"{name}.png")


def save_image(image: Tensor, path: Path, png_info: PngInfo | None = None) -> None:
    """Write an image (C, H, W), and what is said of it; the file is whole, whatever happens."""
    with atomic_path(path, durable=False) as temporary:
        to_pil_image(image).save(temporary, format="PNG", pnginfo=png_info)


def _read_or_raise(reader: Callable[[Path], Tensor], path: Path) -> Tensor:
    try:
        return reader(path)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: no image that can be read ({error})") from error

"""Reconstruct image files at their own size, in tiles where they are large."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqf import terminal
from vqf.dataloading.image_files import ImageFileSplit
from vqf.distributed.engine import Engine
from vqf.errors import UserError, quote_name
from vqf.images import save_image
from vqf.models.tiled_encoding import cell_stride, encode_tiled, largest_tile
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Metric, Reconstruction

log = logging.getLogger("vqf")

PREVIEW_PAIRS, PREVIEW_SIDE = 24, 256  # pairs in the grid, and pixels per side: the center of an image


@dataclass
class OwnSizeResult:
    """What happened to the files."""

    written: int = 0
    cropped: int = 0  # of those written
    tiled: int = 0
    left_out: list[str] = field(default_factory=list)
    previews: list[Tensor] = field(default_factory=list)  # (3, PREVIEW_SIDE, PREVIEW_SIDE), image and reconstruction

    def log_summary(self, tokenizer: Tokenizer) -> None:
        stride = cell_stride(tokenizer)
        side = largest_tile(tokenizer) * stride
        log.info(
            f"{self.written} images at their own size: {self.cropped} cropped at the right and bottom to a multiple of "
            f"{stride} pixels, {self.tiled} in tiles of {side} pixels, {len(self.left_out)} left out"
        )


def reconstruct_files(
    tokenizer: Tokenizer,
    split: ImageFileSplit,
    indices: Sequence[int],
    metrics: Mapping[str, Metric],
    engine: Engine,
    folder: Path,
) -> OwnSizeResult:
    """Write the reconstructions of some files of a split to `folder`, and update the metrics.

    Raises:
        UserError: If no file can be reconstructed.
    """
    tokenizer.eval()
    result, names = OwnSizeResult(), output_names(split.names)
    with terminal.progress("reconstruct", len(indices)) as bar:
        for index in indices:
            if (pixels := _load(split, index, cell_stride(tokenizer), result)) is not None:
                batch = _reconstruct(tokenizer, pixels, engine, result)
                for metric in metrics.values():
                    metric.update(batch)
                save_image(batch.reconstructions[0], folder / f"{names[index]}.png")
            bar.advance()
    result.log_summary(tokenizer)
    if not result.written:
        raise UserError(f"images: none of the {len(indices)} images can be reconstructed; the log names each")
    return result


def output_names(names: Sequence[str]) -> list[str]:
    """Name results like their images, without the ending unless it is all that tells images of a folder apart."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    counts = Counter(stems)
    taken: dict[str, None] = {}
    for name, stem in zip(names, stems, strict=True):
        candidates = chain([stem] if counts[stem] == 1 else [], [name], (f"{name}-{number}" for number in count(2)))
        taken[next(each for each in candidates if each not in taken)] = None
    return list(taken)


def _load(split: ImageFileSplit, index: int, stride: int, result: OwnSizeResult) -> Tensor | None:
    """Read an image, uint8 (3, H, W); None if it is left out."""
    name = split.names[index]
    try:
        image = split.file(index).load_image()
    except (ValueError, OSError) as error:
        _leave_out(name, str(error), result)
        return None
    width, height = (side - side % stride for side in image.size)
    if not width or not height:
        _leave_out(name, f"{image.width} x {image.height} pixels, below the stride {stride}", result)
        return None
    result.cropped += (width, height) != image.size
    return torch.from_numpy(np.array(image.crop((0, 0, width, height)))).permute(2, 0, 1)


def _leave_out(name: str, reason: str, result: OwnSizeResult) -> None:
    result.left_out.append(name)
    log.warning(f"images: {quote_name(name)} is left out ({reason})")


def _reconstruct(tokenizer: Tokenizer, pixels: Tensor, engine: Engine, result: OwnSizeResult) -> Reconstruction:
    images = pixels[None].to(engine.device, torch.float32).div_(127.5).sub_(1)
    tile = largest_tile(tokenizer)
    with torch.no_grad(), engine.autocast():
        indices = encode_tiled(tokenizer, images, tile)
        reconstructions = tokenizer.decode(indices, tile).float()
    result.written += 1
    result.tiled += max(pixels.shape) > tile * cell_stride(tokenizer)
    if len(result.previews) < 2 * PREVIEW_PAIRS:
        result.previews += [_center(each[0]).cpu() for each in (images, reconstructions)]
    grid = (images.shape[2] // cell_stride(tokenizer), images.shape[3] // cell_stride(tokenizer))
    return Reconstruction(images, reconstructions, tokenizer.layout_of(grid).flatten(indices))


def _center(image: Tensor) -> Tensor:
    """Crop the center of an image (3, H, W) without resizing; smaller ones are on white."""
    top, left = (max(side - PREVIEW_SIDE, 0) // 2 for side in image.shape[1:])
    crop = image[:, top : top + PREVIEW_SIDE, left : left + PREVIEW_SIDE]
    return F.pad(crop, (0, PREVIEW_SIDE - crop.shape[2], 0, PREVIEW_SIDE - crop.shape[1]), value=1.0)

"""Speed of decoding and resizing JPEG files on one core: `python benchmarks/decode.py`.

Compares vqf with a plain Pillow loop (open, convert, resize, crop, to tensor) and with torchvision's decoder and
resize. They take turns on the same images in one process; ratios are medians over rounds, relative to plain Pillow.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from vqf import terminal
from vqf.data.images.decode import DRAFT_MARGIN, normalize_pixels, read_crop
from vqf.data.images.resize import crop_and_resize

EARTH = Path(__file__).parent.parent / "vqf" / "data" / "assets" / "earth" / "earth-2048.jpg"
PHOTOS = ("astronaut", "hubble_deep_field", "immunohistochemistry", "retina")
GRAIN = 4.0  # levels: what a sensor at ISO 400, or film, adds to a pixel
QUALITY = 92


def photographs() -> list[np.ndarray]:
    """Return photographs with detail down to the pixel, (H, W, 3)."""
    found = [getattr(skimage.data, name)() for name in PHOTOS]
    return [*found, np.asarray(Image.open(EARTH).convert("RGB"))]


def files(side: int, kind: str = "JPEG", **options: Any) -> list[bytes]:
    """Return files of squares cut out of photographs, never scaled, with grain; up to three of each."""
    random, made = np.random.default_rng(0), []
    for photo in photographs():
        height, width = photo.shape[:2]
        if min(height, width) < side:
            continue
        places = {((height - side) * turn // 2, (width - side) * turn // 2) for turn in range(3)}
        for top, left in sorted(places):
            crop = photo[top : top + side, left : left + side] + random.normal(0, GRAIN, (side, side, 3))
            file = io.BytesIO()
            Image.fromarray(crop.round().clip(0, 255).astype(np.uint8)).save(file, kind, **options)
            made.append(file.getvalue())
    return made


def ours(content: bytes, size: int) -> Tensor:
    """What `data=folder` does with a file."""
    return read_crop(io.BytesIO(content), (size, size)).image


def pillow(content: bytes, size: int) -> Tensor:
    """The usual loop."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def torchvision(content: bytes, size: int) -> Tensor:
    """torchvision's decoder, then its antialiased resize."""
    image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    image = F.resize(image, [size], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(image, [size]).float() / 127.5 - 1


def whole(content: bytes, size: int) -> Tensor:
    """An image without fractions: decoded whole, then scaled."""
    return normalize_pixels(crop_and_resize(Image.open(io.BytesIO(content)).convert("RGB"), (size, size)))


def reduced(content: bytes, size: int) -> Tensor:
    """The same with Pillow's `reduce`, by the factor that leaves as much as `data=folder` does of a JPEG."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return normalize_pixels(crop_and_resize(image.reduce(min(image.size) // (DRAFT_MARGIN * size)), (size, size)))


def measure(ways: dict[str, Callable[[bytes, int], Tensor]], images: list[bytes], size: int, rounds: int):
    """Return the seconds of every round of every way, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            for content in images:
                way(content, size)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    return seconds


def compared(ways: dict[str, Callable[[bytes, int], Tensor]], images: list[bytes], label: str, size: int, rounds: int):
    """Return a row for each way: images per second, and how many times as fast as the first."""
    rows, first = [], next(iter(ways))
    seconds = measure(ways, images, size, rounds)
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds[first], times, strict=True)]
        rate = len(images) / statistics.median(times)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((f"{label}: {name}", f"{rate:.0f}", f"{statistics.median(ratios):.2f}", spread))
    return rows


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ways, rows = {"plain Pillow": pillow, "vqf": ours, "torchvision": torchvision}, []
    for side, size in ((512, 256), (1024, 256), (1024, 128), (256, 256)):
        images = files(side, quality=QUALITY)
        density = sum(map(len, images)) / len(images) / side**2
        rows += compared(ways, images, f"{side} to {size} ({density:.2f} bytes a pixel)", size, rounds)
    terminal.print_table("JPEG, images per second of one core", ("", "images/s", "to plain Pillow", "range"), rows)
    ways, rows = {"decoded whole": whole, "with reduce": reduced}, []
    for kind in ("PNG", "WEBP"):
        rows += compared(ways, files(1024, kind), f"{kind}, 1024 to 128", 128, max(rounds // 3, 1))
    terminal.print_table("what reduce would bring", ("", "images/s", "to decoded whole", "range"), rows)


if __name__ == "__main__":
    main()

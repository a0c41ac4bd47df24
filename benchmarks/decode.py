"""How fast one core turns JPEG files into pictures to train on: `python benchmarks/decode.py`.

vqf beside a plain Pillow loop (open, convert, resize, crop, to tensor) and torchvision's decoder with its resize. The
ways take turns on the same pictures in one process; the ratios are medians over rounds of time against plain Pillow.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import skimage.data
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from vqf import terminal
from vqf.data.imaging import read

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


def files(side: int) -> list[bytes]:
    """Return photographs as square JPEG files, four crops of each."""
    made = []
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)())
        for turn in range(4):
            short = min(photo.size)
            left, top = ((photo.width - short) * turn // 3, (photo.height - short) * turn // 3)
            crop = photo.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            crop.save(file, "JPEG", quality=90)
            made.append(file.getvalue())
    return made


def ours(content: bytes, size: int) -> Tensor:
    """What `data=folder` does with a file."""
    return read(io.BytesIO(content), (size, size)).picture


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


def measure(ways: dict[str, Callable[[bytes, int], Tensor]], pictures: list[bytes], size: int, rounds: int):
    """Return the seconds of every round of every way, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            for content in pictures:
                way(content, size)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    return seconds


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ways = {"plain Pillow": pillow, "vqf": ours, "torchvision": torchvision}
    rows = []
    for side, size in ((512, 256), (1024, 256), (256, 256)):
        pictures = files(side)
        seconds = measure(ways, pictures, size, rounds)
        for name, times in seconds.items():
            ratios = [base / own for base, own in zip(seconds["plain Pillow"], times, strict=True)]
            rate = len(pictures) / statistics.median(times)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            rows.append((f"{side} to {size}: {name}", f"{rate:.0f}", f"{statistics.median(ratios):.2f}", spread))
    terminal.table("pictures per second of one core", ("", "pictures/s", "to plain Pillow", "range"), rows)


if __name__ == "__main__":
    main()

"""What the codes of a tokenizer are used for, as pictures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vqf.loggers.report.curves import ranks
from vqf.loggers.report.galleries import address, codes_picture
from vqf.loggers.report.run_files import Part

COLORS = "viridis"
DEAD = (214, 69, 65)  # of codes that nothing uses


@dataclass
class Codebook:
    """What the page shows of a codebook."""

    words: str
    curve: str  # SVG
    heat: str  # data: address
    mosaic: str  # data: address; empty where codes do not lie on pictures as squares do


def codebook(parts: Iterable[Part]) -> Codebook | None:
    """Draw the codebook of a run; None where nothing is known of it."""
    found = codes_picture(parts)
    if found is None:
        return None
    mosaic, details = found
    counts = [int(count) for count in details["counts"]]
    if not sum(counts):
        return None
    return Codebook(_words(counts), ranks(sorted(counts, reverse=True)), address(heat_map(counts)), mosaic)


def heat_map(counts: Sequence[int]) -> Image.Image:
    """Return one pixel for every code, row by row in a square: the brighter, the more often used; red is never."""
    from matplotlib import colormaps

    side = math.ceil(math.sqrt(len(counts)))
    most = math.log1p(max(counts))
    picture = Image.new("RGBA", (side, -(-len(counts) // side)), (0, 0, 0, 0))
    colors = {count: colormaps[COLORS](math.log1p(count) / most, bytes=True) for count in set(counts)}
    for i, count in enumerate(counts):
        picture.putpixel((i % side, i // side), tuple(int(part) for part in colors[count]) if count else (*DEAD, 255))
    return picture


def _words(counts: Sequence[int]) -> str:
    total, used = sum(counts), sum(count > 0 for count in counts)
    entropy = -sum(count / total * math.log(count / total) for count in counts if count)
    return (
        f"Held-out pictures are {total:,} codes in all, {used:,} different ones of {len(counts):,}. They are used "
        f"unevenly: {math.exp(entropy):,.0f} codes that were all used equally often would carry as much."
    )


def confusion(details: Mapping[str, Any], most: int = 16) -> list[tuple[str, list[int], int]]:
    """Return a row for every class: its name, how many of its samples are seen as each class, and how many there are.

    Empty where there is no such table, or it has more than `most` classes.
    """
    classes = details.get("classes")
    if not isinstance(classes, Mapping) or not 0 < len(classes.get("names", ())) <= most:
        return []
    return [(name, row, sum(row)) for name, row in zip(classes["names"], classes["confusion"], strict=True)]

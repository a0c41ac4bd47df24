"""What the codes of a tokenizer are used for, as images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vqf.loggers.report.curves import usage_curve
from vqf.loggers.report.galleries import code_mosaic, to_data_uri
from vqf.loggers.report.run_files import RunPart

COLORMAP = "viridis"
UNUSED_COLOR = (214, 69, 65)  # of codes that nothing uses


@dataclass
class CodebookSection:
    """What the page shows of a codebook."""

    caption: str
    curve: str  # SVG
    heatmap: str  # data: address
    mosaic: str  # data: address; empty where codes do not lie on images as squares do


def codebook_section(parts: Iterable[RunPart]) -> CodebookSection | None:
    """Draw the codebook of a run; None where nothing is known of it."""
    found = code_mosaic(parts)
    if found is None:
        return None
    mosaic, details = found
    counts = [int(count) for count in details["counts"]]
    if not sum(counts):
        return None
    return CodebookSection(
        _caption(counts), usage_curve(sorted(counts, reverse=True)), to_data_uri(usage_heatmap(counts)), mosaic
    )


def usage_heatmap(counts: Sequence[int]) -> Image.Image:
    """Return one pixel for every code, row by row in a square: the brighter, the more often used; red is never."""
    from matplotlib import colormaps

    side = math.ceil(math.sqrt(len(counts)))
    most = math.log1p(max(counts))
    image = Image.new("RGBA", (side, -(-len(counts) // side)), (0, 0, 0, 0))
    colors = {count: colormaps[COLORMAP](math.log1p(count) / most, bytes=True) for count in set(counts)}
    for i, count in enumerate(counts):
        image.putpixel(
            (i % side, i // side), tuple(int(part) for part in colors[count]) if count else (*UNUSED_COLOR, 255)
        )
    return image


def _caption(counts: Sequence[int]) -> str:
    total, used = sum(counts), sum(count > 0 for count in counts)
    entropy = -sum(count / total * math.log(count / total) for count in counts if count)
    return (
        f"Held-out images are {total:,} codes in all, {used:,} different ones of {len(counts):,}. They are used "
        f"unevenly: {math.exp(entropy):,.0f} codes that were all used equally often would carry as much."
    )


def confusion_rows(details: Mapping[str, Any], max_classes: int = 16) -> list[tuple[str, list[int], int]]:
    """Return a row for every class: its name, how many of its samples are seen as each class, and how many there are.

    Empty where there is no such table, or it has more than `max_classes` classes.
    """
    classes = details.get("classes")
    if not isinstance(classes, Mapping) or not 0 < len(classes.get("names", ())) <= max_classes:
        return []
    return [(name, row, sum(row)) for name, row in zip(classes["names"], classes["confusion"], strict=True)]

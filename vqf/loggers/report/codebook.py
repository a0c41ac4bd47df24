"""The codebook and the confusion matrix of a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vqf.loggers.report.curves import usage_curve
from vqf.loggers.report.galleries import code_mosaic, to_data_uri
from vqf.loggers.report.run_parts import RunPart

COLORMAP = "viridis"
UNUSED_COLOR = (214, 69, 65)


@dataclass
class CodebookSection:
    """The codebook as the page shows it."""

    caption: str
    curve: str  # SVG
    heatmap: str  # data: URI
    mosaic: str  # data: URI; "" if codes do not cover square patches


def codebook_section(parts: Iterable[RunPart]) -> CodebookSection | None:
    """Render the codebook of the first part with counts."""
    mosaic_and_details = code_mosaic(parts)
    if mosaic_and_details is None:
        return None
    mosaic, details = mosaic_and_details
    counts = [int(count) for count in details["counts"]]
    if not sum(counts):
        return None
    curve = usage_curve(sorted(counts, reverse=True))
    return CodebookSection(_caption(counts), curve, to_data_uri(usage_heatmap(counts)), mosaic)


def usage_heatmap(counts: Sequence[int]) -> Image.Image:
    """Render a pixel for each code, brighter with log(1 + count); unused codes are red."""
    from matplotlib import colormaps

    side = math.ceil(math.sqrt(len(counts)))
    highest = math.log1p(max(counts))
    colors = {count: colormaps[COLORMAP](math.log1p(count) / highest, bytes=True) for count in set(counts)}
    image = Image.new("RGBA", (side, -(-len(counts) // side)), (0, 0, 0, 0))
    for i, count in enumerate(counts):
        color = tuple(int(channel) for channel in colors[count]) if count else (*UNUSED_COLOR, 255)
        image.putpixel((i % side, i // side), color)
    return image


def _caption(counts: Sequence[int]) -> str:
    total, used = sum(counts), sum(count > 0 for count in counts)
    entropy = -sum(count / total * math.log(count / total) for count in counts if count)
    return (
        f"The validation images are {total:,} codes in all, {used:,} different ones of {len(counts):,}. The perplexity "
        f"of their distribution is {math.exp(entropy):,.0f}: as many codes, used equally often, would have its entropy."
    )


def confusion_rows(details: Mapping[str, Any], max_classes: int = 16) -> list[tuple[str, list[int], int]]:
    """Return rows (class, samples by predicted class, samples in all); [] above `max_classes` classes."""
    classes = details.get("classes", {})
    names, confusion = classes.get("names", []), classes.get("confusion", [])
    if len(names) > max_classes or any(len(row) != len(names) for row in (confusion, *confusion)):
        return []
    return [(name, row, sum(row)) for name, row in zip(names, confusion, strict=True)]

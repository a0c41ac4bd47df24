"""docs/fidelity.md: what is compared with what, how, and how far apart the two sides are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from tests.parity.comparisons import TOLERANCE, Comparison, Gap, Results, declared, lacking

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
MARK = "<!-- Below: python -m tests.parity -->"
HEAD = "| vqf | compared with | what | how | float64 | float32 |\n| --- | --- | --- | --- | --- | --- |"
NOTHING = "–"
CELLS = r"(?P<part>.+?) \| (?P<peer>.+?) \| (?P<what>.+?) \| (?P<how>.*?) ?\| (?P<float64>[^|]+) \| (?P<float32>[^|]+)"
ROW = re.compile(rf"^\| {CELLS} \|$", re.M)


def tables(results: Results) -> str:
    """Write a table for every file of comparisons, with the rows of which there are numbers."""
    sections = []
    measured = {comparison for comparison, _ in results}
    shown = [(comparison, about) for comparison, about in declared().items() if comparison in measured]
    for title, group in groupby(shown, key=lambda each: each[1].title):
        rows, before = [], ""
        for comparison, about in group:
            numbers = (_word(results.get((comparison, dtype))) for dtype in TOLERANCE)
            how = "" if about.how == before else about.how
            rows.append(f"| {' | '.join((comparison.part, comparison.peer, comparison.what, how, *numbers))} |")
            before = about.how
        sections.append("\n".join([title, "", HEAD, *rows]))
    return "\n\n".join(sections) + "\n"


def write(results: Results, page: Path = PAGE) -> None:
    """Replace what stands below the mark; what stands above it is written by hand.

    Raises:
        ValueError: If a number is missing; the page stays as it is.
    """
    if missing := lacking(results):
        raise ValueError(
            f"{len(missing)} numbers are missing, the first is of {missing[0]}: {page.name} stays as it is"
        )
    above, _, _ = page.read_text().partition(MARK)
    page.write_text(f"{above}{MARK}\n\n{tables(results)}")


@dataclass(frozen=True)
class Row:
    """What the page says of a comparison."""

    how: str
    numbers: Mapping[torch.dtype, str]  # of the dtypes that it has a number for


def listed(page: Path = PAGE) -> dict[Comparison, Row]:
    """Return the comparisons that the page lists."""
    found, how = {}, ""
    for row in ROW.finditer(page.read_text()):
        if row["part"] in ("vqf", "---"):  # the head of a table
            continue
        how = row["how"] or how
        cells = dict(zip(TOLERANCE, (row["float64"], row["float32"]), strict=True))
        numbers = {dtype: cell for dtype, cell in cells.items() if cell != NOTHING}
        found[Comparison(row["part"], row["peer"], row["what"])] = Row(how, numbers)
    return found


def _word(gap: Gap | None) -> str:
    return NOTHING if gap is None else str(gap)

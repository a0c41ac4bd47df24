"""docs/fidelity.md: what is compared with what, how, and how far apart the two sides are."""

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch

from tests.parity.comparisons import Comparison, Results, declared

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
MARK = "<!-- Below: python -m tests.parity -->"
HEAD = "| vqf | compared with | what | how | float64 | float32 |\n| --- | --- | --- | --- | --- | --- |"
ROW = re.compile(r"^\| (?P<part>.+?) \| (?P<peer>.+?) \| (?P<what>.+?) \| (?P<how>.*?) ?\| (\S+) \| (\S+) \|$", re.M)


def tables(results: Mapping[tuple[Comparison, torch.dtype], float]) -> str:
    """Write a table for every file of comparisons."""
    sections = []
    for title, group in groupby(declared().items(), key=lambda each: each[1][0]):
        rows, before = [], ""
        for comparison, (_, how) in group:
            numbers = (_word(results.get((comparison, dtype))) for dtype in (torch.float64, torch.float32))
            cells = (comparison.part, comparison.peer, comparison.what, "" if how == before else how, *numbers)
            rows.append(f"| {' | '.join(cells)} |")
            before = how
        sections.append("\n".join([title, "", HEAD, *rows]))
    return "\n\n".join(sections) + "\n"


def write(results: Results) -> None:
    """Replace what stands below the mark; what stands above it is written by hand."""
    above, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{above}{MARK}\n\n{tables(results)}")


def listed() -> dict[Comparison, str]:
    """Return the comparisons that the page lists, and how each is made."""
    found, how = {}, ""
    for row in ROW.finditer(PAGE.read_text()):
        if row["part"] in ("vqf", "---"):  # the head of a table
            continue
        how = row["how"] or how
        found[Comparison(row["part"], row["peer"], row["what"])] = how
    return found


def _word(difference: float | None) -> str:
    if difference is None:
        return "–"
    return f"{difference:.0e}" if difference else "equal"

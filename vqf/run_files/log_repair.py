"""Cuts `metrics.jsonl` to the step that a run resumes from; damaged lines are set aside."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from vqf.atomic import atomic_path
from vqf.protocols import VALIDATION_PREFIX
from vqf.run_files.aside import aside_path, make_way, set_aside
from vqf.run_files.metrics_log import DamagedLines, LogLine, read_lines

log = logging.getLogger("vqf")

Place = tuple[int, bool]  # a step, and whether the line is of its validation; they never fall in a log


def truncate_log(path: Path, last: Place) -> int:
    """Delete the lines after a place; damaged lines move to `aside_path(path)`.

    Memory does not grow with the length of the file.

    Returns:
        The step of the last line that is left; 0 without any.

    Raises:
        OSError: If it cannot be written; the file is unchanged.
    """
    if not _is_readable(path):
        return 0
    aside, damaged, last_step = aside_path(path), DamagedLines(), 0
    with ExitStack() as files:
        kept, removed = _open_new(files, path), None
        for line, place in _placed_lines(path):
            if place is None:
                removed = removed or _open_new(files, aside)
                removed.write(line.raw)
                damaged.add(line.number)
            elif place <= last:
                kept.write(line.raw.rstrip(b"\n") + b"\n")
                last_step = place[0]
    if damaged.count:
        log.warning("%s: %s; moved to %s, and left out of the curves", path, damaged, aside.name)
    return last_step


def _is_readable(path: Path) -> bool:
    make_way(path)
    if not path.is_file():
        return False
    try:
        path.open("rb").close()
    except OSError as error:
        set_aside(path, f"cannot be read ({error.strerror})")
        return False
    return True


def _open_new(files: ExitStack, path: Path) -> BinaryIO:
    return files.enter_context(files.enter_context(atomic_path(path)).open("wb"))


def _placed_lines(path: Path) -> Iterator[tuple[LogLine, Place | None]]:
    """Yield lines with their places; None if a line is damaged, or its place does not fit into the order."""
    before, window = (-1, False), deque[tuple[LogLine, Place]]()
    for line in chain(read_lines(path), [None, None]):
        if line is not None and line.values is None:
            yield line, None
            continue
        if line is not None and line.values is not None:
            window.append((line, _place(line.values)))
        if window and (line is None or len(window) == 3):
            fits = _fits(before, *(place for _, place in window))
            first, place = window.popleft()
            before = place if fits else before
            yield first, place if fits else None


def _fits(before: Place, place: Place, after: Place | None = None, later: Place | None = None) -> bool:
    """Tell whether a place follows `before`; if the next one falls, the later one tells which of the two is odd."""
    falls = after is not None and before <= after < place
    return place >= before and not (falls and (later is None or later < place))


def _place(values: Mapping[str, Any]) -> Place:
    return values["step"], any(key.startswith(VALIDATION_PREFIX) for key in values)

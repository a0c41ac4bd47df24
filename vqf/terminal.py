"""What a person sees while vqf works: one console, progress bars with rate and time left, tables.

On a terminal a bar is drawn in place; elsewhere (a log file, a batch system) a plain line says the same
every few seconds, so that logs stay readable.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)
log = logging.getLogger("vqf")

BINARY_PREFIXES = "KMGT"
LOG_INTERVAL_SECONDS = 15.0  # between two lines where there is no terminal


class TerminalHandler(logging.Handler):
    """Print log records through the console, so that they do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        console.print(printable(self.format(record)), markup=False, soft_wrap=True)


class LogFile(logging.FileHandler):
    """A log file that is done without where it cannot be written, as on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leave a record out; a bug keeps its traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def muted() -> Iterator[None]:
    """Say nothing."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f}/s")


class ProgressBar:
    """The progress of one long job."""

    def __init__(self, title: str, total: int, done: int, progress: Progress | None) -> None:
        self.title, self.total, self.done, self.progress = title, total, done, progress
        self.task = progress.add_task(title, total=total, completed=done, note="") if progress else None
        self.start_time = self.last_logged = time.monotonic()
        self.initial = done
        self.note = ""

    @property
    def remaining(self) -> int:
        """How much is still to do."""
        return self.total - self.done

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more of the job is done; `format_metrics` stands behind the bar."""
        self.done += count
        self.note = note or self.note
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, advance=count, note=self.note)
        elif time.monotonic() - self.last_logged > LOG_INTERVAL_SECONDS:
            self.last_logged = time.monotonic()
            log.info(self._line())

    def _line(self) -> str:
        rate = (self.done - self.initial) / max(time.monotonic() - self.start_time, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        return f"{self.title} {self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left  {self.note}".rstrip()


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
    """Show the progress of a job of `total` parts, of which `done` were done in an earlier process."""
    if not console.is_terminal:
        yield ProgressBar(title, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield ProgressBar(title, total, done, bars)


def format_metrics(values: Mapping[str, float]) -> str:
    """Word a few numbers for the end of a bar."""
    return "  ".join(f"{key} {value:.3g}" for key, value in values.items())


def format_number(value: float, digits: int = 4) -> str:
    """Write a number with as many significant digits, whole and large ones without decimals: 0.1235, 22.1, 12,345."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"


def format_seconds(seconds: float) -> str:
    """Write a duration: 45 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(size: float) -> str:
    """Write a size with four significant digits: 512 bytes, 1.5 KiB, 23.75 GiB."""
    if size < 2**10:
        return f"{round(size)} bytes"
    power = min(int(math.log2(size)) // 10, len(BINARY_PREFIXES))
    return f"{size / 2 ** (10 * power):.4g} {BINARY_PREFIXES[power - 1]}iB"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: first column left, the others right."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        drawn.add_column(Text(name), justify="right" if i else "left")
    for row in rows:
        drawn.add_row(*(Text(printable(each)) for each in row))  # as they are: rich would take [l1] for a style
    console.print(drawn)


def printable(text: str) -> str:
    """Return text with an escape for what is no character: names of files may hold any byte."""
    return text.encode("utf-8", "backslashreplace").decode()

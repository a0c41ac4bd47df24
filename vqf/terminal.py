"""What a person sees while vqf works: one console, progress bars with rate and time left, tables.

On a terminal a bar is drawn in place; elsewhere (a log file, a batch system) a plain line says the same
every few seconds, so that logs stay readable.
"""

import logging
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

QUIET_SECONDS = 15.0  # between two lines where there is no terminal


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
def silent() -> Iterator[None]:
    """Say nothing."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f}/s")


class Bar:
    """The progress of one long job."""

    def __init__(self, title: str, total: int, done: int, progress: Progress | None) -> None:
        self.title, self.total, self.done, self.progress = title, total, done, progress
        self.task = progress.add_task(title, total=total, completed=done, note="") if progress else None
        self.began = self.told = time.monotonic()
        self.first = done
        self.note = ""

    @property
    def left(self) -> int:
        """How much is still to do."""
        return self.total - self.done

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more of the job is done; `note` stands behind the bar."""
        self.done += count
        self.note = note or self.note
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, advance=count, note=self.note)
        elif time.monotonic() - self.told > QUIET_SECONDS:
            self.told = time.monotonic()
            log.info(self._line())

    def _line(self) -> str:
        rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        return f"{self.title} {self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left  {self.note}".rstrip()


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show the progress of a job of `total` parts, of which `done` were done in an earlier process."""
    if not console.is_terminal:
        yield Bar(title, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield Bar(title, total, done, bars)


def note(values: Mapping[str, float]) -> str:
    """Word a few numbers for the end of a bar."""
    return "  ".join(f"{key} {value:.3g}" for key, value in values.items())


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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

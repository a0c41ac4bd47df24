"""Console, log handlers, progress bars, tables, and the format of numbers.

Names of classes, files, components and metrics may be anybody's: whatever is shown here is made printable.
"""

import logging
import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vqf.errors import printable
from vqf.run_files.aside import make_way

EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as of other programs whose reader has gone

console = Console(highlight=False)
log = logging.getLogger("vqf")

BINARY_PREFIXES = "KMGT"
LOG_INTERVAL_SECONDS = 15.0  # between two lines of progress without a terminal
LINE_ENDS = "\n\t"  # of texts of several lines, such as a traceback or a config


def keep_on_one_line(record: logging.LogRecord) -> bool:
    """Filter that makes the message of a log record one printable line."""
    message = record.getMessage()
    if (line := printable(message)) != message:
        record.msg, record.args = line, ()
    return True


log.addFilter(keep_on_one_line)


class TerminalHandler(logging.Handler):
    """Prints log records without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(printable(self.format(record), LINE_ENDS), markup=False, soft_wrap=True)


class LogFile(logging.FileHandler):
    """A log file that skips records on a full disk; a folder in its place is set aside."""

    def _open(self) -> TextIOWrapper:
        make_way(Path(self.baseFilename))
        return super()._open()

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LINE_ENDS)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def muted() -> Iterator[None]:
    """Disable vqf's log inside the block."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def collect_messages() -> Iterator[list[str]]:
    """Collect what the block logs, which is shown as well."""
    collector = MessageCollector()
    log.addHandler(collector)
    try:
        yield collector.messages
    finally:
        log.removeHandler(collector)


class MessageCollector(logging.Handler):
    """Keeps the messages of log records."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def printable_stdout() -> Iterator[None]:
    """Make printable what is printed inside the block; it appears at the end."""
    text = StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        sys.stdout.write(printable(text.getvalue(), LINE_ENDS))


@contextmanager
def ending_with_reader() -> Iterator[None]:
    """End without a message once the reader of the output has gone, as in `--help | head`."""
    before = signal.signal(signal.SIGPIPE, _end_without_reader)
    try:
        yield
        _flush()
    except SystemExit:
        _flush()
        raise
    finally:
        signal.signal(signal.SIGPIPE, before)


def _end_without_reader(*_: object) -> None:
    # A handler, not an except: logging and rich catch a BrokenPipeError, and a socket or worker may raise it, too.
    if lost := [stream for stream in (sys.stdout, sys.stderr) if _has_lost_reader(stream)]:
        for stream in lost:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # takes what Python flushes at its end
        sys.exit(EXIT_CLOSED_PIPE)


def _has_lost_reader(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except (OSError, ValueError):  # not a file, or closed
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _flush() -> None:
    with suppress(BrokenPipeError):  # the handler of the signal ends the process
        sys.stdout.flush()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f}/s")


class ProgressBar:
    """A bar on a terminal, elsewhere a log line every `LOG_INTERVAL_SECONDS`."""

    def __init__(self, title: str, total: int, done: int, progress: Progress | None) -> None:
        self.title, self.total, self.done, self.progress = title, total, done, progress
        self.task = progress.add_task(title, total=total, completed=done, note="") if progress else None
        self.start_time = self.last_logged = time.monotonic()
        self.initial = done
        self.note = ""

    @property
    def remaining(self) -> int:
        return self.total - self.done

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = printable(note) or self.note
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
    """Show progress; the rate leaves out the `done` items of an earlier process."""
    if not console.is_terminal:
        yield ProgressBar(title, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield ProgressBar(title, total, done, bars)


def format_metrics(values: Mapping[str, float]) -> str:
    """Format metrics for a progress bar."""
    return "  ".join(f"{key} {value:.3g}" for key, value in values.items())


def format_number(value: float, digits: int = 4) -> str:
    """Format with `digits` significant digits: 0.1235, 22.1, 12,345."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"


def format_seconds(seconds: float) -> str:
    """Format a duration: 45 s, 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(size: float) -> str:
    """Format a size: 512 bytes, 1.5 KiB, 23.75 GiB."""
    if size < 2**10:
        return f"{round(size)} bytes"
    power = min(int(math.log2(size)) // 10, len(BINARY_PREFIXES))
    return f"{size / 2 ** (10 * power):.4g} {BINARY_PREFIXES[power - 1]}iB"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column aligned left."""
    # Text, since rich reads [l1] in a str as a style
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def printable_value(value: object) -> object:
    """Make a string printable, for `finalize` of a template; line ends and other values stay."""
    return printable(value, LINE_ENDS) if type(value) is str else value  # Markup is ours, and large

"""What could not be read, in any process of a run: counted together, and named in the first one's log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from vqf.distributed import comm

log = logging.getLogger("vqf")

LogRecords = list[tuple[int, str]]  # level and text of what was to be said


def relay(records: LogRecords) -> None:
    """Log in the first process; the others leave it to that one, which does at the next `flush_relayed`."""
    for level, text in records:
        if comm.is_main():
            log.log(level, text)
        else:
            comm.post_line(f"{level} [process {comm.rank()}] {text}")


def flush_relayed() -> None:
    """In the first process, log what the others have left."""
    if comm.is_main():
        for each in comm.read_lines():
            level, _, text = each.partition(" ")
            log.log(int(level), text)


@contextmanager
def capture_logs() -> Iterator[LogRecords]:
    """Collect what is logged, where somebody else has to say it: in a worker, and in all processes but the first."""
    collector = _LogCollector()
    if get_worker_info() is None and comm.is_main():
        yield collector.records
        return
    before = log.handlers, log.propagate
    log.handlers, log.propagate = [collector], False
    try:
        yield collector.records
    finally:
        log.handlers, log.propagate = before


class _LogCollector(logging.Handler):
    """Keeps log records for the parent of a worker, which owns the terminal and the log file.

    A lock of theirs that happened to be held when the worker was forked would never be released in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: LogRecords = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))

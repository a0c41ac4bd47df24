"""Log lines of other ranks and of data workers, shown by rank 0."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from vqf.distributed import comm
from vqf.distributed.peer_errors import post_line, read_lines

log = logging.getLogger("vqf")

LogRecords = list[tuple[int, str]]  # level, message


def relay(records: LogRecords) -> None:
    """Log records on rank 0; other ranks post them for `flush_relayed`."""
    for level, text in records:
        if comm.is_main():
            log.log(level, text)
        else:
            post_line(f"{level} [process {comm.rank()}] {text}")


def flush_relayed() -> None:
    """Log on rank 0 what the others have posted."""
    if comm.is_main():
        for line in read_lines():
            level, _, text = line.partition(" ")
            log.log(int(level), text)


@contextmanager
def capture_logs() -> Iterator[LogRecords]:
    """Collect log records in data workers and on all ranks but 0."""
    collector = _LogCollector()
    if get_worker_info() is None and comm.is_main():
        yield collector.records  # nothing is collected
        return
    before = log.handlers, log.propagate
    # All handlers are replaced: in a forked worker one of them may hold a lock that nobody will ever release.
    log.handlers, log.propagate = [collector], False
    try:
        yield collector.records
    finally:
        log.handlers, log.propagate = before


class _LogCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: LogRecords = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))

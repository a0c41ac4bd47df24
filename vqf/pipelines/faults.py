"""What could not be read, in any process of a run: counted together, and named in the first one's log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import get_worker_info

from vqf import ranks
from vqf.protocols import Split

log = logging.getLogger("vqf")

Records = list[tuple[int, str]]  # level and text of what was to be said


@runtime_checkable
class Faulty(Protocol):
    """A split that notes which of its pictures cannot be read."""

    def faults(self) -> list[Tensor]: ...  # bool, shared with worker processes

    def check_faults(self) -> None: ...  # raises a UserError if they are too many


def agree(split: Split) -> None:
    """Let every process of a run know what any of them could not read; every process must call.

    Raises:
        UserError: In all of them, if it is too much.
    """
    if ranks.world() == 1 or not isinstance(split, Faulty):
        return  # a process by itself has counted what it found
    own = split.faults()
    for found in ranks.each([each.nonzero().flatten() for each in own]):
        for flags, places in zip(own, found, strict=True):
            flags[places] = True
    pass_on()
    with noted():  # all would say the same
        split.check_faults()


def say(records: Records) -> None:
    """Log in the first process; the others leave it to that one, which does at the next `pass_on`."""
    for level, text in records:
        if ranks.first():
            log.log(level, text)
        else:
            ranks.leave(f"{level} [process {ranks.rank()}] {text}")


def pass_on() -> None:
    """In the first process, log what the others have left."""
    if ranks.first():
        for each in ranks.left():
            level, _, text = each.partition(" ")
            log.log(int(level), text)


@contextmanager
def noted() -> Iterator[Records]:
    """Collect what is logged, where somebody else has to say it: in a worker, and in all processes but the first."""
    collector = _Collector()
    if get_worker_info() is None and ranks.first():
        yield collector.records
        return
    before = log.handlers, log.propagate
    log.handlers, log.propagate = [collector], False
    try:
        yield collector.records
    finally:
        log.handlers, log.propagate = before


class _Collector(logging.Handler):
    """Keeps log records for the parent of a worker, which owns the terminal and the log file.

    A lock of theirs that happened to be held when the worker was forked would never be released in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: Records = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))

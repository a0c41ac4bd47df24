"""Messages between ranks that do not wait for each other: why a rank fails, and log lines for rank 0.

They use the key-value store of rank 0, since collectives hang once a rank has failed.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(seconds=10)  # the longest that a rank waits for another one's message

_store: "dist.Store | None" = None  # stays after the group is left: `main` reports errors then
_failure_posted = False  # by this rank
_lines_read = 0  # by this rank


def connect(store: "dist.Store") -> None:
    """Use the store of a new process group."""
    global _store, _failure_posted, _lines_read
    _store, _failure_posted, _lines_read = store, False, 0


def report_once(report: Callable[[], None], message: str) -> None:
    """Call `report` on the first rank that comes here; the others wait; `message` becomes their `peer_failure`."""
    if _store is None:
        report()
        return
    with suppress(RuntimeError):
        post_failure(message)
        if _store.add("reporters", 1) == 1:
            report()
            _store.set("reported", "")
        _store.wait(["reported"], TIMEOUT)


def post_failure(message: str) -> None:
    """Tell the other ranks why this one fails; only the first message is kept."""
    global _failure_posted
    if _store is None or _failure_posted:
        return
    _failure_posted = True
    with suppress(RuntimeError):
        _store.compare_set("failure", "", message)
        _store.add("informed", 1)


def peer_failure() -> str | None:
    """Return why another rank has failed, if one has."""
    with suppress(RuntimeError):
        if _store is not None and not _failure_posted and _store.check(["failure"]):
            message = _store.get("failure").decode()
            _store.add("informed", 1)
            return message
    return None


def wait_for_peers(world_size: int) -> None:
    """Keep the store alive until all ranks know of a failure, at most `TIMEOUT`."""
    if not _failure_posted:
        return
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    with suppress(RuntimeError):
        while _store is not None and _store.add("informed", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.02)


def post_line(line: str) -> None:
    """Leave a line for rank 0, without waiting for it."""
    if _store is not None:
        with suppress(RuntimeError):
            _store.set(f"line {_store.add('lines', 1)}", line)


def read_lines() -> list[str]:
    """Return, on rank 0, newly posted lines."""
    global _lines_read
    lines: list[str] = []
    with suppress(RuntimeError):
        while _store is not None and _lines_read < _store.add("lines", 0):
            lines.append(_store.get(f"line {_lines_read + 1}").decode())
            _lines_read += 1
    return lines

"""Messages between ranks that do not wait for each other: why a rank fails, and log lines for rank 0.

They use the key-value store of rank 0, since collectives hang once a rank has failed.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from vqf.distributed import comm

TIMEOUT = timedelta(seconds=10)  # the longest that a rank waits for another one's message

_store: "dist.Store | None" = None  # stays after the group is left: `main` reports errors then
_failure_posted = False  # by this rank
_lines_read = 0  # by this rank
_processes: list[tuple[str, int]] = []  # host name and process id of every rank

LOSS_TIMEOUT = 3.0  # seconds after a broken connection until its process has surely ended, or others have said why
BROKEN_CONNECTION = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore")


def connect(store: "dist.Store") -> None:
    """Use the store of a new process group."""
    global _store, _failure_posted, _lines_read
    _store, _failure_posted, _lines_read = store, False, 0
    _processes.clear()


def exchange_process_ids() -> None:
    """Tell every rank where the others run, for `lost_peers`; a collective."""
    _processes[:] = comm.all_gather_object((socket.gethostname(), os.getpid()))


def report_once(report: Callable[[], None], message: str) -> None:
    """Call `report` on the first rank that comes here; the others wait; `message` becomes their `peer_failure`."""
    if _store is None:
        report()
        return
    posted = _failure_posted  # then rank 0 knew of it, and reports before it ends
    try:
        is_first = _store.add("reporters", 1) == 1
        post_failure(message)  # only now: rank 0 keeps the store alive until all have posted
    except RuntimeError:  # rank 0 has ended, and with it the store
        first = min(set(range(comm.world_size())) - set(_ended_ranks()), default=0)
        is_first = not posted and comm.rank() == first
    if is_first:
        report()
    with suppress(RuntimeError):
        if is_first:
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


def explain_lost_peers(error: RuntimeError) -> str | None:
    """Say which ranks have ended without a message, if that is why a collective has failed: SIGKILL leaves none.

    Only ranks on this machine can be seen; a rank on theirs tells the others.
    """
    if _store is None or not any(words in str(error) for words in BROKEN_CONNECTION):
        return None
    deadline = time.monotonic() + LOSS_TIMEOUT
    while not (ended := _ended_ranks()) and time.monotonic() < deadline:
        if message := peer_failure():
            return message
        time.sleep(0.05)
    who = f"process {', '.join(map(str, ended))}" if ended else "a process on another machine"
    return (
        f"{who} of {len(_processes)} has ended without a message: it was killed, by hand or because its machine had no "
        "memory left; continue with resume=true"
    )


def _ended_ranks() -> list[int]:
    host = socket.gethostname()
    return [rank for rank, (other, pid) in enumerate(_processes) if other == host and _has_ended(pid)]


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:  # of another user, or a system without /proc
        return False
    return state in ("Z", "X")  # ended, but its parent has not asked for its status


def wait_for_peers(world_size: int) -> None:
    """Keep the store alive until all ranks that run know of a failure, at most `TIMEOUT`."""
    if not _failure_posted or _store is None:
        return
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    with suppress(RuntimeError):
        while _store.add("informed", 0) < world_size - len(_ended_ranks()) and time.monotonic() < deadline:
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

"""Signals of a scheduler or terminal: SIGTERM and SIGHUP, save and stop; SIGUSR1, save and continue."""

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

from vqf.distributed import comm

STOPPING = (signal.SIGTERM, signal.SIGHUP)  # in the order in which the exit code names them
SIGNAL_EXIT_CODE = 128  # plus the signal: not 0, so that a scheduler sees that the run is not finished


class PreemptionSignals:
    """Records SIGTERM, SIGHUP and SIGUSR1 for the trainer, in the main thread only.

    SIGHUP comes when the terminal closes. Where it is ignored, as under nohup, it stays ignored.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.previous_handlers: dict[int, Any] = {}
        self.terminals: list[int] = []  # file descriptors of standard output and error, where a closed one would fail

    def __enter__(self) -> Self:
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, signal.SIGUSR1):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self.previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and comm.world_size() > 1:
            return  # another process may have been killed: a SIGTERM of the launcher must not cut the message off
        while self.previous_handlers:
            signal.signal(*self.previous_handlers.popitem())

    def stop_signal(self) -> signal.Signals | None:
        """The signal to stop that any rank has received; every rank must ask."""
        return next((number for number in STOPPING if comm.any_rank(number in self.received)), None)

    def should_save(self) -> bool:
        """Whether any rank has received a signal; answers SIGUSR1. Every rank must ask."""
        requested = bool(self.received)
        self.received.discard(signal.SIGUSR1)
        return comm.any_rank(requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)
        if number == signal.SIGHUP:
            _discard_output(self.terminals)


def _discard_output(descriptors: Iterable[int]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)

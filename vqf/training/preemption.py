"""Signals of a scheduler: SIGTERM, save and stop; SIGUSR1, save and continue."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from vqf.distributed import comm

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # not 0: a scheduler must see that the run is not finished


class PreemptionSignals:
    """Records SIGTERM and SIGUSR1 for the trainer, in the main thread only."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self.previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self.previous_handlers:
            signal.signal(*self.previous_handlers.popitem())

    def should_stop(self) -> bool:
        """Whether any rank has received SIGTERM; every rank must ask."""
        return comm.any_rank(signal.SIGTERM in self.received)

    def should_save(self) -> bool:
        """Whether any rank has received a signal; answers SIGUSR1. Every rank must ask."""
        requested = bool(self.received)
        self.received.discard(signal.SIGUSR1)
        return comm.any_rank(requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)

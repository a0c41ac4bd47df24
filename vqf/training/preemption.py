"""What a scheduler says to a running job: SIGTERM, save and end; SIGUSR1, save and go on."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from vqf.distributed import comm

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # exit status: a scheduler must not take an unfinished run for a finished one


class PreemptionSignals:
    """While entered, notes the signals that come, for the loop to answer between two steps.

    A handler may run in the middle of an optimizer step, where there is nothing to save. Outside of the main thread
    no signal can be had, and none is noted.
    """

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
        """Tell whether the run is to end, in any process of it. Every process must ask."""
        return comm.any_rank(signal.SIGTERM in self.received)

    def should_save(self) -> bool:
        """Tell whether a checkpoint is wanted now, in any process, and forget it. Every process must ask."""
        wanted = bool(self.received)
        self.received.discard(signal.SIGUSR1)
        return comm.any_rank(wanted)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)

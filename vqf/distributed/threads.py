"""The number of threads that torch uses on a CPU.

OpenMP's threads wait for each other at every operation, and spin meanwhile. Beside another busy program one of them has
no core: steps become up to 45 times slower, while those of a single thread keep their speed. `threads=auto` measures
which number is fastest. To sleep instead of spinning (OMP_WAIT_POLICY=passive) is no cure: on an idle machine with two
cores two threads become slower than one.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.distributed import comm

log = logging.getLogger("vqf")

MEASURE_SECONDS = 0.2  # per number of threads: many time slices of the operating system
MIN_GAIN = 1.25  # another number must be so many times as fast
WINDOW_SECONDS = 3.0  # steps are timed in windows, so that a single slow one does not count
SLOWDOWN = 3.0  # a window whose steps take so many times those of the fastest is slow
RETRY_SECONDS = 60.0  # after a measurement that changed nothing, and while fewer threads than possible are used

# Of the convolutions that are timed. They are small, as the layers of a small model: most of their time is waiting.
CHANNELS, SIDE, LAYERS = 32, 32, 8


def measure_speed(threads: int) -> float:
    """Return images per second through some convolutions, with one image per thread."""
    torch.set_num_threads(threads)
    images = torch.ones(threads, CHANNELS, SIDE, SIDE, device="cpu")
    kernel = torch.full((CHANNELS, CHANNELS, 3, 3), 1 / (9 * CHANNELS), device="cpu")
    start = time.monotonic()
    _convolve(images, kernel)  # also prepares later calls
    if (seconds := time.monotonic() - start) > MEASURE_SECONDS:
        return threads / seconds  # slow enough to know
    start, count = time.monotonic(), 0
    while (seconds := time.monotonic() - start) < MEASURE_SECONDS:
        _convolve(images, kernel)
        count += threads
    return count / seconds


@torch.no_grad()
def _convolve(images: Tensor, kernel: Tensor) -> None:
    for _ in range(LAYERS):
        images = F.silu(F.conv2d(images, kernel, padding=1))


class StepTimes:
    """Times of steps of one kind of work."""

    def __init__(self) -> None:
        self.seconds, self.count, self.fastest = 0.0, 0, math.inf

    def add(self, seconds: float) -> bool:
        """Add a step; returns whether it completes a slow window."""
        self.seconds, self.count = self.seconds + seconds, self.count + 1
        if self.seconds < WINDOW_SECONDS:
            return False
        mean = self.seconds / self.count
        self.seconds, self.count, self.fastest = 0.0, 0, min(self.fastest, mean)
        return mean > SLOWDOWN * self.fastest


class ThreadTuner:
    """Sets torch's number of threads: a fixed one, or the fastest.

    What it measures is not part of the training: a run with "auto" computes the digits of one with the chosen number.

    Attributes:
        limit: Threads that torch would use by itself; OMP_NUM_THREADS sets it.
    """

    def __init__(
        self, measure: Callable[[int], float] = measure_speed, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.measure, self.clock = measure, clock
        self.limit = self.count = 0
        self.on_cpu = self.tunes = self.resumed = False
        self.measured_at: float | None = None  # None: not yet in this stage
        self.patience = 0.0  # seconds from then on in which slow steps are no reason to measure
        self.step_times: dict[str, StepTimes] = {}  # by kind of work

    def configure(self, threads: int | str, device: torch.device) -> None:
        """Start a stage with a number of threads, or "auto".

        "auto" changes the number only on a CPU, and in a single process: several processes must round alike.
        """
        if (current := torch.get_num_threads()) != self.count:
            self.limit = self.count = current  # set by the user
        if threads != "auto":
            self._set(int(threads))
        elif not self.tunes:
            self._set(self.limit)  # the job before this one may have fixed it
        self.on_cpu = device.type == "cpu"
        self.tunes = threads == "auto" and self.on_cpu and self.limit > 1 and comm.world_size() == 1
        self.measured_at, self.resumed, self.step_times = None, False, {}

    def resume(self, threads: int) -> None:
        """Continue with the number of a checkpoint, unless another is several times as fast."""
        if self.tunes and 1 <= threads <= self.limit:
            self._set(threads)
            self.measured_at, self.resumed = None, True
        self._warn_unless(threads)

    def choose_once(self) -> None:
        """Measure, if this stage has not."""
        if self.tunes and self.measured_at is None:
            self._choose()

    @contextmanager
    def watch(self, work: str) -> Iterator[None]:
        """Measure before the first step of a stage, and after steps that have become slow.

        Args:
            work: Kind of a step; steps of one kind take about the same time.
        """
        self.choose_once()
        start = self.clock()
        yield
        if not self.tunes or self.measured_at is None:
            return
        now = self.clock()
        slow = self.step_times.setdefault(work, StepTimes()).add(now - start)
        waited = now - self.measured_at
        if (slow and waited > self.patience) or (self.count < self.limit and waited > RETRY_SECONDS):
            self._choose()

    def _choose(self) -> None:
        is_first, is_resumed = self.measured_at is None, self.resumed
        before = self.limit if is_first and not is_resumed else self.count
        speeds = self._set_fastest(before, SLOWDOWN if is_resumed else MIN_GAIN)
        changed = self.count != before
        self.measured_at, self.resumed = self.clock(), False
        self.patience = 0.0 if is_first or changed else RETRY_SECONDS
        if is_resumed and not changed:
            log.info("threads=auto: %d threads, as in the checkpoint", before)
        elif is_first or changed:
            log.info("threads=auto: %s%s", "" if is_first else "from here on ", self._describe(speeds))
        if is_resumed:
            self._warn_unless(before)

    def _set_fastest(self, default: int, min_gain: float) -> dict[int, float]:
        """Set the fastest number, or the default if none is clearly faster; returns the speed of each."""
        # All but one are best beside one busy program, half of them beside several.
        candidates = {1, self.limit // 2, self.limit - 1, self.limit, default}
        speeds = {threads: self.measure(threads) for threads in sorted(candidates)}
        fastest = max(speeds, key=lambda threads: speeds[threads])
        self._set(fastest if speeds[fastest] >= min_gain * speeds[default] else default)
        return speeds

    def _describe(self, speeds: Mapping[int, float]) -> str:
        if self.count == self.limit:
            return f"{self.count} threads, {speeds[self.count] / speeds[1]:.2g} times as fast as 1"
        gain = speeds[self.count] / speeds[self.limit]
        return f"{self.count} of {self.limit} threads, {gain:.2g} times as fast as all of them beside other programs"

    def _warn_unless(self, threads: int) -> None:
        if self.on_cpu and self.count != threads:
            log.warning("not bit for bit the run that was saved: threads %d → %d", threads, self.count)

    def _set(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.count = threads


cpu_threads = ThreadTuner()

"""Load batches in worker processes."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vqf.batch import Batch, Sample
from vqf.dataloading.order import BatchKeys, SampleKey, ShuffledBatches, batches_for_rank
from vqf.dataloading.read_errors import sync_read_errors
from vqf.distributed.log_relay import LogRecords, capture_logs, relay
from vqf.errors import UserError
from vqf.protocols import Split, StreamingSplit

log = logging.getLogger("vqf")

DEFAULT_TIMEOUT = 600.0  # seconds to wait for a batch from a worker

# A scheduler, or a terminal that closes, may send these to every process of a job. The parent handles them, and needs
# its workers to finish.
PARENT_SIGNALS = {signal.SIGUSR1, signal.SIGHUP} | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


def train_batches(
    split: Split,
    order: ShuffledBatches,
    *,
    start: int,
    steps: int,
    workers: int,
    timeout: float = DEFAULT_TIMEOUT,
    sync_every: int | None = None,
) -> Generator[Batch]:
    """Yield this rank's batches of steps `start` to `steps` - 1; a stream is read in its own order.

    Args:
        workers: Loader processes of this rank; 0 loads in this process.
        timeout: Seconds to wait for a batch.
        sync_every: Steps between two merges of the unreadable images of all ranks.

    Raises:
        UserError: As `keyed_batches`, or if all ranks together could not read too many images.
    """
    if isinstance(split, StreamingSplit):
        batches = _stream_batches(split, order, start, steps, workers, timeout)
    else:
        batches = keyed_batches(split, BatchKeys(order, start, steps), workers=workers, timeout=timeout)
    for step, batch in enumerate(batches, start + 1):
        yield batch
        if sync_every and step % sync_every == 0:
            sync_read_errors(split)
    sync_read_errors(split)


def sequential_batches(
    split: Split, batch_size: int, *, count: int | None = None, workers: int = 0, timeout: float = DEFAULT_TIMEOUT
) -> Generator[Batch]:
    """Yield this rank's slices of a split in order, as augmented in epoch 0; the last batch may be smaller.

    Args:
        batch_size: Over all ranks.
        count: Number of images, spread evenly over the split; all by default.

    Raises:
        UserError: As `train_batches`.
    """
    length = len(split)
    count = length if count is None else min(count, length)
    keys = [(0, i * length // count) for i in range(count)]
    yield from keyed_batches(split, batches_for_rank(keys, batch_size), workers=workers, timeout=timeout)
    sync_read_errors(split)


def keyed_batches(
    split: Split, keys: Iterable[Sequence[SampleKey]], *, workers: int = 0, timeout: float = DEFAULT_TIMEOUT
) -> Generator[Batch]:
    """Yield one batch per list of keys.

    Raises:
        UserError: If an image cannot be loaded or replaced, or a worker hangs or dies.
    """
    if isinstance(split, StreamingSplit):
        workers = min(workers, 1)  # every worker would read the full stream
    return _unwrap(_build_loader(_SplitDataset(split), workers, timeout, batch_sampler=keys), workers, timeout)


def _stream_batches(
    split: StreamingSplit, order: ShuffledBatches, start: int, steps: int, workers: int, timeout: float
) -> Generator[Batch]:
    if split.max_readers < order.world_size:
        raise UserError(f"data.train: {split.max_readers} shards cannot be shared by {order.world_size} processes")
    if start:
        log.info("data.train: a stream has no exact order; the resumed run reads it in another order")
    workers = min(workers, split.max_readers // order.world_size)
    loaded = _build_loader(_StreamDataset(split, order, start), workers, timeout, batch_size=None)
    for _, batch in zip(range(start, steps), _unwrap(loaded, workers, timeout), strict=False):
        yield batch


def _build_loader(
    dataset: Dataset["_LoadedBatch"], workers: int, timeout: float, **order: Any
) -> Iterator["_LoadedBatch"]:
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        timeout=timeout if workers else 0,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # without one the loader would advance the global generator
        **order,
    )
    with _blocked_signals(PARENT_SIGNALS):
        return iter(loader)


@contextmanager
def _blocked_signals(numbers: set[signal.Signals]) -> Iterator[None]:
    """Block signals in this thread meanwhile, and for good in the processes that it starts, which inherit the mask."""
    # Blocking in the first line of a child would be too late for the threads that torch and
    # multiprocessing start before it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(number: int) -> None:
    if signal.SIGTERM in PARENT_SIGNALS:
        threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()


def _exit_on_parent_sigterm() -> None:
    """Exit at a SIGTERM of the parent only."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass
class _LoadedBatch:
    batch: Batch | None = None
    error: UserError | None = None  # the loader would wrap an exception of a worker in a traceback
    records: LogRecords = field(default_factory=list)

    def pin_memory(self) -> "_LoadedBatch":
        if self.batch is not None:
            self.batch = self.batch.map(lambda value: value.pin_memory())
        return self


class _SplitDataset(Dataset[_LoadedBatch]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitems__(self, keys: Sequence[SampleKey]) -> _LoadedBatch:
        return _collate(lambda: [self.split.item(epoch, index) for epoch, index in keys])


class _StreamDataset(IterableDataset[_LoadedBatch]):
    def __init__(self, split: StreamingSplit, order: ShuffledBatches, start: int) -> None:
        self.split, self.order, self.start = split, order, start

    def __iter__(self) -> Iterator[_LoadedBatch]:
        per_rank = self.order.batch_size // self.order.world_size
        samples = self.split.stream(self.start, self.order.rank, self.order.world_size)
        while True:
            yield _collate(lambda: [next(samples) for _ in range(per_rank)])


def _collate(samples: Callable[[], list[Sample]]) -> _LoadedBatch:
    with capture_logs() as records:
        try:
            return _LoadedBatch(Batch.collate(samples()), records=records)
        except UserError as error:
            return _LoadedBatch(error=error, records=records)


def _unwrap(loaded: Iterator[_LoadedBatch], workers: int, timeout: float) -> Generator[Batch]:
    while True:
        try:
            result = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if message := _worker_error_message(str(error), workers, timeout):
                raise UserError(message) from error
            raise
        relay(result.records)
        if result.batch is None:
            raise result.error or AssertionError("a batch or an error")
        yield result.batch


def _worker_error_message(text: str, workers: int, timeout: float) -> str | None:
    """Explain a RuntimeError of torch's loader; None for any other."""
    if "timed out after" in text:
        return (
            f"workers={workers}: no batch came for {timeout:g} s; a worker hangs (a network disk?); "
            "try workers=0, or a longer worker_timeout"
        )
    if "exited unexpectedly" in text:
        return f"workers={workers}: a worker process died (out of memory?); try fewer of them"
    return None


def _identity(batch: Any) -> Any:
    return batch  # the datasets collate

"""The processes that load images, batch after batch; `vqf.dataloading.order` says which image comes when."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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

DEFAULT_TIMEOUT = 600.0  # seconds that the next batch may take

# A scheduler may send these to every process of a job. The parent answers them, and needs its workers for it.
PARENT_SIGNALS = {signal.SIGUSR1} | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


def train_batches(
    split: Split,
    order: ShuffledBatches,
    *,
    start: int,
    steps: int,
    workers: int,
    timeout: float = DEFAULT_TIMEOUT,
    sync_every: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of steps `start` to `steps` - 1; those of a stream in the order in which it comes.

    Args:
        timeout: Seconds that a batch may take where workers load it.
        sync_every: After so many steps, and at the end, the processes tell each other what they could not read.

    Raises:
        UserError: See `keyed_batches`, and if all processes together could not read too much.
    """
    if isinstance(split, StreamingSplit):
        found = _stream_batches(split, order, start, steps, workers, timeout)
    else:
        found = keyed_batches(split, BatchKeys(order, start, steps), workers=workers, timeout=timeout)
    for step, batch in enumerate(found, start + 1):
        yield batch
        if sync_every and step % sync_every == 0:
            sync_read_errors(split)
    sync_read_errors(split)


def sequential_batches(
    split: Split, batch_size: int, *, count: int | None = None, workers: int = 0, timeout: float = DEFAULT_TIMEOUT
) -> Iterator[Batch]:
    """Yield every image of a split once, in order, as it looks in epoch 0; the last batch may be smaller.

    Args:
        count: Yield only so many images, spread evenly over the split.
        timeout: Seconds that a batch may take where workers load it.
    """
    length = len(split)
    count = length if count is None else min(count, length)
    keys = [(0, i * length // count) for i in range(count)]
    yield from keyed_batches(split, batches_for_rank(keys, batch_size), workers=workers, timeout=timeout)
    sync_read_errors(split)


def keyed_batches(
    split: Split, keys: Iterable[Sequence[SampleKey]], *, workers: int = 0, timeout: float = DEFAULT_TIMEOUT
) -> Iterator[Batch]:
    """Yield a batch for every list of keys.

    Raises:
        UserError: If an image cannot be had, or a worker process hangs or dies.
    """
    if isinstance(split, StreamingSplit):
        workers = min(workers, 1)  # each would read all of it
    return _unwrap(_build_loader(_SplitDataset(split), workers, timeout, batch_sampler=keys), workers, timeout)


def _stream_batches(
    split: StreamingSplit, order: ShuffledBatches, start: int, steps: int, workers: int, timeout: float
) -> Iterator[Batch]:
    if split.max_readers < order.world_size:
        raise UserError(f"data.train: {split.max_readers} shards cannot be shared by {order.world_size} processes")
    if start:
        log.info("data.train: a stream has no exact order; this run goes on in another one than it would have had")
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
        generator=torch.Generator(),  # its own, or the loader would draw from the global one
        **order,
    )
    with _blocked_signals(PARENT_SIGNALS):
        return iter(loader)


@contextmanager
def _blocked_signals(numbers: set[signal.Signals]) -> Iterator[None]:
    """Block signals in this thread, and for all their lives in processes that are started meanwhile.

    A thread of theirs that is older than their first line, such as torch and multiprocessing start, has it that way.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(number: int) -> None:
    if signal.SIGTERM in PARENT_SIGNALS:
        threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()


def _exit_on_parent_sigterm() -> None:
    """End this process at the SIGTERM of the parent, which so ends a worker that hangs, and at nobody else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass
class _LoadedBatch:
    """What comes back for a list of keys: a batch, or the mistake that prevents it, and what is to be logged."""

    batch: Batch | None = None
    error: UserError | None = None  # raised in a worker, it would arrive wrapped in a traceback
    records: LogRecords = field(default_factory=list)

    def pin_memory(self) -> "_LoadedBatch":
        if self.batch is not None:
            self.batch = self.batch.map(lambda value: value.pin_memory())
        return self


class _SplitDataset(Dataset[_LoadedBatch]):
    """A split as the data loader wants it: asked for a whole batch of keys at a time."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitems__(self, keys: Sequence[SampleKey]) -> _LoadedBatch:
        return _collate(lambda: [self.split.item(epoch, index) for epoch, index in keys])


class _StreamDataset(IterableDataset[_LoadedBatch]):
    """A stream as the data loader wants it: this process's part of batch after batch, without end."""

    def __init__(self, split: StreamingSplit, order: ShuffledBatches, start: int) -> None:
        self.split, self.order, self.start = split, order, start

    def __iter__(self) -> Iterator[_LoadedBatch]:
        part = self.order.batch_size // self.order.world_size
        samples = self.split.stream(self.start, self.order.rank, self.order.world_size)
        while True:
            yield _collate(lambda: [next(samples) for _ in range(part)])


def _collate(samples: Callable[[], list[Sample]]) -> _LoadedBatch:
    """Make a batch, with what is to be said about it."""
    with capture_logs() as records:
        try:
            return _LoadedBatch(Batch.collate(samples()), records=records)
        except UserError as mistake:
            return _LoadedBatch(error=mistake, records=records)


def _unwrap(loaded: Iterator[_LoadedBatch], workers: int, timeout: float) -> Iterator[Batch]:
    while True:
        try:
            each = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if trouble := _worker_error_message(str(error), workers, timeout):
                raise UserError(trouble) from error
            raise
        relay(each.records)
        if each.batch is None:
            raise each.error or AssertionError("a batch or a mistake")
        yield each.batch


def _worker_error_message(text: str, workers: int, timeout: float) -> str | None:
    if "timed out after" in text:
        return (
            f"workers={workers}: no batch came for {timeout:g} s; a worker hangs (a network disk?); "
            "try workers=0, or a longer worker_timeout"
        )
    if "exited unexpectedly" in text:
        return f"workers={workers}: a worker process died (out of memory?); try fewer of them"
    return None


def _identity(loaded: Any) -> Any:
    return loaded

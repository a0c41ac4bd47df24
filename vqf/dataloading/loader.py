"""The processes that load pictures, batch after batch; `vqf.dataloading.order` says which picture comes when."""

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
from vqf.dataloading.order import Key, Order, Plan, in_batches
from vqf.dataloading.read_errors import agree
from vqf.distributed.log_relay import Records, noted, say
from vqf.errors import UserError
from vqf.protocols import Split, Streamed

log = logging.getLogger("vqf")

TIMEOUT = 600.0  # seconds that the next batch may take

# A scheduler may send these to every process of a job. The parent answers them, and needs its workers for it.
LEFT_TO_PARENT = {signal.SIGUSR1} | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


def batches(
    split: Split,
    order: Order,
    *,
    start: int,
    steps: int,
    workers: int,
    timeout: float = TIMEOUT,
    every: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of steps `start` to `steps` - 1; those of a stream in the order in which it comes.

    Args:
        timeout: Seconds that a batch may take where workers load it.
        every: After so many steps, and at the end, the processes tell each other what they could not read.

    Raises:
        UserError: See `keyed`, and if all processes together could not read too much.
    """
    if isinstance(split, Streamed):
        found = _streamed(split, order, start, steps, workers, timeout)
    else:
        found = keyed(split, Plan(order, start, steps), workers=workers, timeout=timeout)
    for step, batch in enumerate(found, start + 1):
        yield batch
        if every and step % every == 0:
            agree(split)
    agree(split)


def sequential(
    split: Split, batch_size: int, *, count: int | None = None, workers: int = 0, timeout: float = TIMEOUT
) -> Iterator[Batch]:
    """Yield every picture of a split once, in order, as it looks in epoch 0; the last batch may be smaller.

    Args:
        count: Yield only so many pictures, spread evenly over the split.
        timeout: Seconds that a batch may take where workers load it.
    """
    length = len(split)
    count = length if count is None else min(count, length)
    keys = [(0, i * length // count) for i in range(count)]
    yield from keyed(split, in_batches(keys, batch_size), workers=workers, timeout=timeout)
    agree(split)


def keyed(
    split: Split, keys: Iterable[Sequence[Key]], *, workers: int = 0, timeout: float = TIMEOUT
) -> Iterator[Batch]:
    """Yield a batch for every list of keys.

    Raises:
        UserError: If a picture cannot be had, or a worker process hangs or dies.
    """
    if isinstance(split, Streamed):
        workers = min(workers, 1)  # each would read all of it
    return _received(_loader(_Pictures(split), workers, timeout, batch_sampler=keys), workers, timeout)


def _streamed(split: Streamed, order: Order, start: int, steps: int, workers: int, timeout: float) -> Iterator[Batch]:
    if split.readers < order.world:
        raise UserError(f"data.train: {split.readers} shards cannot be shared by {order.world} processes")
    if start:
        log.info("data.train: a stream has no exact order; this run goes on in another one than it would have had")
    workers = min(workers, split.readers // order.world)
    loaded = _loader(_Stream(split, order, start), workers, timeout, batch_size=None)
    for _, batch in zip(range(start, steps), _received(loaded, workers, timeout), strict=False):
        yield batch


def _loader(pictures: Dataset["_Loaded"], workers: int, timeout: float, **order: Any) -> Iterator["_Loaded"]:
    loader = DataLoader(
        pictures,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        timeout=timeout if workers else 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # its own, or the loader would draw from the global one
        **order,
    )
    with _blocked(LEFT_TO_PARENT):
        return iter(loader)


@contextmanager
def _blocked(numbers: set[signal.Signals]) -> Iterator[None]:
    """Block signals in this thread, and for all their lives in processes that are started meanwhile.

    A thread of theirs that is older than their first line, such as torch and multiprocessing start, has it that way.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(number: int) -> None:
    if signal.SIGTERM in LEFT_TO_PARENT:
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End this process at the SIGTERM of the parent, which so ends a worker that hangs, and at nobody else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass
class _Loaded:
    """What comes back for a list of keys: a batch, or the mistake that prevents it, and what is to be logged."""

    batch: Batch | None = None
    mistake: UserError | None = None  # raised in a worker, it would arrive wrapped in a traceback
    records: Records = field(default_factory=list)

    def pin_memory(self) -> "_Loaded":
        if self.batch is not None:
            self.batch = self.batch.map(lambda value: value.pin_memory())
        return self


class _Pictures(Dataset[_Loaded]):
    """A split as the data loader wants it: asked for a whole batch of keys at a time."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitems__(self, keys: Sequence[Key]) -> _Loaded:
        return _load(lambda: [self.split.item(epoch, index) for epoch, index in keys])


class _Stream(IterableDataset[_Loaded]):
    """A stream as the data loader wants it: this process's part of batch after batch, without end."""

    def __init__(self, split: Streamed, order: Order, start: int) -> None:
        self.split, self.order, self.start = split, order, start

    def __iter__(self) -> Iterator[_Loaded]:
        part = self.order.batch_size // self.order.world
        samples = self.split.stream(self.start, self.order.rank, self.order.world)
        while True:
            yield _load(lambda: [next(samples) for _ in range(part)])


def _load(samples: Callable[[], list[Sample]]) -> _Loaded:
    """Make a batch, with what is to be said about it."""
    with noted() as records:
        try:
            return _Loaded(Batch.collate(samples()), records=records)
        except UserError as mistake:
            return _Loaded(mistake=mistake, records=records)


def _received(loaded: Iterator[_Loaded], workers: int, timeout: float) -> Iterator[Batch]:
    while True:
        try:
            each = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if trouble := _worker_trouble(str(error), workers, timeout):
                raise UserError(trouble) from error
            raise
        say(each.records)
        if each.batch is None:
            raise each.mistake or AssertionError("a batch or a mistake")
        yield each.batch


def _worker_trouble(text: str, workers: int, timeout: float) -> str | None:
    if "timed out after" in text:
        return (
            f"workers={workers}: no batch came for {timeout:g} s; a worker hangs (a network disk?); "
            "try workers=0, or a longer worker_timeout"
        )
    if "exited unexpectedly" in text:
        return f"workers={workers}: a worker process died (out of memory?); try fewer of them"
    return None


def _as_is(loaded: Any) -> Any:
    return loaded

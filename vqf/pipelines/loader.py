"""Which pictures make up which batch, and the processes that load them.

The order of the data is a pure function: batch k of epoch e is a slice of the permutation that (seed, e) gives, and
a picture depends on (seed, epoch, index). A run therefore stands at one number, its step, and any number of worker
processes, or of ranks, sees the same pictures in the same order.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vqf import ranks
from vqf.errors import UserError
from vqf.pipelines.faults import Records, agree, noted, say
from vqf.protocols import Batch, Sample, Split, Streamed
from vqf.randomness import generator

log = logging.getLogger("vqf")

K = TypeVar("K")
Key = tuple[int, int]  # epoch and index: all that a worker needs to know

TIMEOUT = 600.0  # seconds that the next batch may take

# A scheduler may send these to every process of a job. The parent answers them, and needs its workers for it.
LEFT_TO_PARENT = {signal.SIGUSR1} | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


class Order:
    """The order in which the pictures of a split are trained on.

    Args:
        length: Pictures of the split.
        batch_size: Pictures of one step, over all ranks. The last pictures of an epoch, too few for a batch,
            are left out; another epoch leaves out others.
        rank: This process among `world`, each of which takes an equal part of every micro-batch.
        accumulate: Micro-batches that a step is cut into, the same ones for any number of processes.

    Raises:
        UserError: If not even one batch comes together, or it cannot be divided among the ranks.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: a step needs at least one picture")
        if batch_size > length:
            raise UserError(f"batch_size={batch_size} is larger than the {length} pictures to train on")
        if batch_size % accumulate:
            raise UserError(f"accumulate={accumulate} must divide batch_size={batch_size}")
        if batch_size % (accumulate * world):
            parts = f"{world} processes and accumulate={accumulate} micro-batches"
            raise UserError(f"batch_size={batch_size} cannot be divided among {parts}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch_steps = length // batch_size

    def batch(self, step: int) -> list[Key]:
        """Return this rank's part of the batch of a step, counted from 0."""
        epoch, position = divmod(step, self.epoch_steps)
        first = position * self.batch_size
        indices = _permutation(self.length, self.seed, epoch)[first : first + self.batch_size]
        mine = indices.view(self.accumulate, self.world, -1)[:, self.rank]
        return [(epoch, index) for index in mine.flatten().tolist()]


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
        found = keyed(split, _Plan(order, start, steps), workers=workers, timeout=timeout)
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


def in_batches(keys: Sequence[K], batch_size: int) -> list[list[K]]:
    """Cut keys into batches, the last of which may be smaller, and return this process's part of each.

    All parts are equally long, so that they can be collected: the last key fills up the last batch's, and
    `ranks.collect` cuts it off again.
    """
    batch_size = -(-batch_size // ranks.world()) * ranks.world()
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return [[batch[i] for i in part_of(len(batch))] for batch in batches]


def part_of(count: int) -> list[int]:
    """Return which of `count` things this process does, see `in_batches`."""
    part = -(-count // ranks.world())
    return [min(ranks.rank() * part + i, count - 1) for i in range(part)]


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


class _Plan:
    """The keys of a run of steps, made one step at a time."""

    def __init__(self, order: Order, start: int, steps: int) -> None:
        self.order, self.start, self.steps = order, start, steps

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.order.batch(step) for step in range(self.start, self.steps))

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)


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


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(length, generator=generator("order", seed, epoch))

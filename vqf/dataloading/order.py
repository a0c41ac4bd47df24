"""Which images make up which batch.

The order of the data is a pure function: batch k of epoch e is a slice of the permutation that (seed, e) gives, and
an image depends on (seed, epoch, index). A run therefore stands at one number, its step, and any number of worker
processes, or of ranks, sees the same images in the same order.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from vqf.distributed import comm
from vqf.errors import UserError
from vqf.seeding import seeded_generator

K = TypeVar("K")
SampleKey = tuple[int, int]  # epoch and index: all that a worker needs to know


class ShuffledBatches:
    """The order in which the images of a split are trained on.

    Args:
        length: Images of the split.
        batch_size: Images of one step, over all ranks. The last images of an epoch, too few for a batch,
            are left out; another epoch leaves out others.
        rank: This process among `world_size`, each of which takes an equal part of every micro-batch.
        accumulate: Micro-batches that a step is cut into, the same ones for any number of processes.

    Raises:
        UserError: If not even one batch comes together, or it cannot be divided among the ranks.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: a step needs at least one image")
        if batch_size > length:
            raise UserError(f"batch_size={batch_size} is larger than the {length} images to train on")
        if batch_size % accumulate:
            raise UserError(f"accumulate={accumulate} must divide batch_size={batch_size}")
        if batch_size % (accumulate * world_size):
            parts = f"{world_size} processes and accumulate={accumulate} micro-batches"
            raise UserError(f"batch_size={batch_size} cannot be divided among {parts}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.steps_per_epoch = length // batch_size

    def batch(self, step: int) -> list[SampleKey]:
        """Return this rank's part of the batch of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.batch_size
        indices = _permutation(self.length, self.seed, epoch)[first : first + self.batch_size]
        mine = indices.view(self.accumulate, self.world_size, -1)[:, self.rank]
        return [(epoch, index) for index in mine.flatten().tolist()]


class BatchKeys:
    """The keys of a run of steps, made one step at a time."""

    def __init__(self, order: ShuffledBatches, start: int, steps: int) -> None:
        self.order, self.start, self.steps = order, start, steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return (self.order.batch(step) for step in range(self.start, self.steps))

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)


def batches_for_rank(keys: Sequence[K], batch_size: int) -> list[list[K]]:
    """Cut keys into batches, the last of which may be smaller, and return this process's part of each.

    All parts are equally long, so that they can be collected: the last key fills up the last batch's, and
    `ranks.gather_rows` cuts it off again.
    """
    batch_size = -(-batch_size // comm.world_size()) * comm.world_size()
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return [[batch[i] for i in indices_for_rank(len(batch))] for batch in batches]


def indices_for_rank(count: int) -> list[int]:
    """Return which of `count` things this process does, see `batches_for_rank`."""
    part = -(-count // comm.world_size())
    return [min(comm.rank() * part + i, count - 1) for i in range(part)]


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(length, generator=seeded_generator("order", seed, epoch))

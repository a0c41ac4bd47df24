"""The order of the training images, as a pure function of seed and step.

Batch k of epoch e is a slice of permutation(seed, e), for any number of ranks and workers; an augmented image depends
on (seed, epoch, index).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from vqf.distributed import comm
from vqf.errors import UserError
from vqf.seeding import seeded_generator

K = TypeVar("K")
SampleKey = tuple[int, int]  # epoch and index: they determine a sample


class ShuffledBatches:
    """Batches of a shuffled split.

    Args:
        batch_size: Over all ranks. The incomplete last batch of an epoch is dropped.
        world_size: Number of processes; each takes an equal slice of every micro-batch.
        accumulate: Micro-batches per step; their images do not depend on `world_size`.

    Raises:
        UserError: If the split is smaller than a batch, or a batch is not divisible.
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
            shares = f"{world_size} processes and accumulate={accumulate} micro-batches"
            raise UserError(f"batch_size={batch_size} cannot be divided among {shares}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.steps_per_epoch = length // batch_size

    def batch(self, step: int) -> list[SampleKey]:
        """Return this rank's keys of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.batch_size
        indices = _permutation(self.length, self.seed, epoch)[first : first + self.batch_size]
        rank_indices = indices.view(self.accumulate, self.world_size, -1)[:, self.rank]
        return [(epoch, index) for index in rank_indices.flatten().tolist()]


class BatchKeys:
    """Batch sampler over the steps `start` to `steps` - 1."""

    def __init__(self, order: ShuffledBatches, start: int, steps: int) -> None:
        self.order, self.start, self.steps = order, start, steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return (self.order.batch(step) for step in range(self.start, self.steps))

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)


def batches_for_rank(keys: Sequence[K], batch_size: int) -> list[list[K]]:
    """Split keys into batches, the last of which may be smaller, and return this rank's slice of each.

    Slices are equally long on all ranks: the last key pads them, and `comm.gather_rows` removes the padding.
    """
    batch_size = -(-batch_size // comm.world_size()) * comm.world_size()
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return [[batch[i] for i in indices_for_rank(len(batch))] for batch in batches]


def indices_for_rank(count: int) -> list[int]:
    """Return this rank's slice of `range(count)`, padded as in `batches_for_rank`."""
    per_rank = -(-count // comm.world_size())
    return [min(comm.rank() * per_rank + i, count - 1) for i in range(per_rank)]


@lru_cache(maxsize=2)  # a permutation of a large split takes a while; two epochs meet in the prefetched batches
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(length, generator=seeded_generator("order", seed, epoch))

import logging
import os
import signal
import time
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqf.batch import Batch, Sample
from vqf.dataloading import loader
from vqf.dataloading.loader import keyed_batches, sequential_batches, train_batches
from vqf.dataloading.order import ShuffledBatches, batches_for_rank
from vqf.errors import UserError

log = logging.getLogger("vqf")


class Numbers:
    """Images whose first two channels are their epoch and index."""

    fingerprint = "numbers"

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def item(self, epoch, index):
        return Sample(torch.tensor([epoch, index, 0.0]).view(3, 1, 1), label=index, mask=torch.ones(1, 1, 1))


class FaultyNumbers(Numbers):
    """Calls a function before some of its images."""

    def __init__(self, length, actions):
        super().__init__(length)
        self.actions = actions

    def item(self, epoch, index):
        if index in self.actions:
            self.actions[index]()
        return super().item(epoch, index)


def raise_user_error():
    raise UserError("data.root: 'x.png' is broken")


def raise_bug():
    raise ZeroDivisionError("a bug")


def keys_of(batch):
    return [(int(epoch), int(index)) for epoch, index in batch.images[:, :2, 0, 0].tolist()]


orders = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**40)).filter(
    lambda given: given[0] >= given[1]
)


@given(orders)
def test_an_epoch_has_no_image_twice_and_drops_less_than_a_batch(numbers):
    length, batch_size, seed = numbers
    order = ShuffledBatches(length, batch_size, seed)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        keys = [key for step in steps for key in order.batch(step)]
        assert {each for each, _ in keys} == {epoch}
        seen = [index for _, index in keys]
        assert len(set(seen)) == len(seen) > length - batch_size
        assert set(seen) <= set(range(length))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 30), st.integers(0, 9), st.integers(0, 100))
def test_ranks_share_the_batch_of_one_process(per_rank, world, more, seed, step):
    length, batch_size = per_rank * world + more, per_rank * world
    batch = ShuffledBatches(length, batch_size, seed).batch(step)
    slices = [ShuffledBatches(length, batch_size, seed, rank, world).batch(step) for rank in range(world)]
    assert [key for keys in slices for key in keys] == batch
    assert {len(keys) for keys in slices} == {per_rank}


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 100))
def test_ranks_share_every_micro_batch_of_one_process(per_rank, world, accumulate, seed, step):
    batch_size = per_rank * world * accumulate
    length = batch_size + 3
    batch = ShuffledBatches(length, batch_size, seed, accumulate=accumulate).batch(step)
    orders = [ShuffledBatches(length, batch_size, seed, rank, world, accumulate) for rank in range(world)]
    slices = [order.batch(step) for order in orders]
    for i in range(accumulate):
        micro_batch = [key for keys in slices for key in keys[i * per_rank : (i + 1) * per_rank]]
        assert micro_batch == batch[i * per_rank * world : (i + 1) * per_rank * world]


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 5))
def test_padded_slices_of_the_ranks_gather_to_all_keys(count, batch_size, world):
    keys, by_rank = list(range(count)), []
    for rank in range(world):
        with mock.patch.multiple("vqf.distributed.comm", rank=lambda rank=rank: rank, world_size=lambda: world):
            by_rank.append(batches_for_rank(keys, batch_size))
    assert len({len(batches) for batches in by_rank}) == 1
    gathered, remaining = [], count
    for slices in zip(*by_rank, strict=True):
        assert len({len(keys_of_rank) for keys_of_rank in slices}) == 1
        size = min(len(slices[0]) * world, remaining)
        gathered += [key for keys_of_rank in slices for key in keys_of_rank][:size]
        remaining -= size
    assert gathered == keys


def test_the_order_is_frozen():
    order = ShuffledBatches(10, 4, seed=0)
    assert [order.batch(step) for step in range(4)] == [
        [(0, 6), (0, 8), (0, 3), (0, 1)],
        [(0, 9), (0, 4), (0, 2), (0, 0)],
        [(1, 2), (1, 3), (1, 6), (1, 7)],
        [(1, 9), (1, 0), (1, 4), (1, 1)],
    ]


def test_epochs_and_seeds_have_orders_of_their_own():
    sequences = {
        tuple(index for _, index in ShuffledBatches(100, 100, seed).batch(epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(sequences) == 25


def test_every_position_is_equally_likely():
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        for position, (_, index) in enumerate(ShuffledBatches(5, 5, seed).batch(0)):
            counts[position, index] += 1
    chi = ((counts - 400) ** 2 / 400).sum()
    assert chi < 40  # 16 degrees of freedom: the chance of more is below 0.001


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12))
def test_resuming_at_a_step_gives_the_same_batches(start, more):
    split, order = Numbers(7), ShuffledBatches(7, 2, seed=5)
    uninterrupted = [keys_of(batch) for batch in train_batches(split, order, start=0, steps=start + more, workers=0)]
    resumed = [keys_of(batch) for batch in train_batches(split, order, start=start, steps=start + more, workers=0)]
    assert len(uninterrupted) == start + more
    assert resumed == uninterrupted[start:]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    split, order = Numbers(11), ShuffledBatches(11, 3, seed=1)
    in_process = list(train_batches(split, order, start=2, steps=9, workers=0))
    by_workers = list(train_batches(split, order, start=2, steps=9, workers=workers))
    assert len(in_process) == len(by_workers) == 7
    for one, other in zip(in_process, by_workers, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.masks, other.masks)


def test_every_field_of_a_batch_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = Batch(torch.zeros(1, 3, 2, 2), labels=torch.zeros(1), condition_indices={"map": torch.zeros(1, 2, 2)})
    assert len(loader._LoadedBatch(batch).pin_memory().batch) == 1
    assert len(pinned) == 3
    assert loader._LoadedBatch().pin_memory().batch is None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(train_batches(Numbers(4), ShuffledBatches(4, 2, 0), start=0, steps=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential_batches_hold_every_image_once_in_order(workers):
    batches = list(sequential_batches(Numbers(10), 4, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [key for batch in batches for key in keys_of(batch)] == [(0, i) for i in range(10)]


@pytest.mark.parametrize(("count", "expected"), [(5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (99, list(range(10))), (0, [])])
def test_sequential_spreads_a_count_over_the_split(count, expected):
    assert [
        index for batch in sequential_batches(Numbers(10), 4, count=count) for _, index in keys_of(batch)
    ] == expected


def test_keyed_batches_hold_the_given_keys():
    keys = [[(3, 1), (0, 0)], [(7, 4)]]
    assert [keys_of(batch) for batch in keyed_batches(Numbers(5), keys)] == keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 64, 0), "batch_size=64 is larger than the 12 images to train on"),
        ((12, 0, 0), "batch_size=0: a step needs at least one image"),
        ((12, 10, 0, 0, 4), "batch_size=10 cannot be divided among 4 processes and accumulate=1 micro-batches"),
        ((12, 10, 0, 0, 1, 4), "accumulate=4 must divide batch_size=10"),
    ],
)
def test_impossible_orders(arguments, message):
    with pytest.raises(UserError) as caught:
        ShuffledBatches(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_error_of_a_worker_is_one_line(workers):
    with pytest.raises(UserError) as caught:
        list(sequential_batches(FaultyNumbers(8, {5: raise_user_error}), 2, workers=workers))
    assert str(caught.value) == "data.root: 'x.png' is broken"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_keeps_its_traceback(workers):
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(sequential_batches(FaultyNumbers(8, {5: raise_bug}), 2, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_warnings_of_workers_are_logged_by_the_parent_once(workers, caplog):
    split = FaultyNumbers(8, {1: lambda: log.warning("image %d is odd", 1), 6: lambda: log.info("image 6 is fine")})
    with caplog.at_level(logging.INFO, "vqf"):
        list(sequential_batches(split, 2, workers=workers))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "image 1 is odd"),
        ("INFO", "image 6 is fine"),
    ]
    assert {record.process for record in caplog.records} == {os.getpid()}


def test_a_hung_worker_is_reported():
    with pytest.raises(UserError) as caught:
        list(sequential_batches(FaultyNumbers(4, {2: lambda: time.sleep(30)}), 2, workers=1, timeout=1.5))
    assert str(caught.value) == (
        "workers=1: no batch came for 1.5 s; a worker hangs (a network disk?); "
        "try workers=0, or a longer worker_timeout"
    )


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError) as caught:
        list(sequential_batches(FaultyNumbers(4, {2: lambda: os.kill(os.getpid(), signal.SIGKILL)}), 2, workers=1))
    assert str(caught.value) == "workers=1: a worker process died (out of memory?); try fewer of them"

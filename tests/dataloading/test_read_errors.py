"""Unreadable images are counted over all processes of a run, and logged by rank 0."""

import logging
from contextlib import suppress

import pytest

from tests.data.packing import png
from tests.support.processes import run_processes
from vqf.data.folder import Folder
from vqf.data.union import Union
from vqf.dataloading.loader import sequential_batches, train_batches
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.read_errors import sync_read_errors
from vqf.distributed import comm
from vqf.distributed.log_relay import flush_relayed
from vqf.errors import UserError

BROKEN = (1, 5, 9, 13, 17, 21, 25, 29)


@pytest.fixture
def image_folder(tmp_path):
    """Forty images, of which eight are broken."""
    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(b"broken" if i in BROKEN else png((i, 0, 0)))
    return str(tmp_path)


class LogCollector(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def train_and_collect(root, max_unreadable, workers, steps, every):
    """Return the steps taken, the error, the lines logged by this process, and the unreadable images."""
    collector, log = LogCollector(), logging.getLogger("vqf")
    log.addHandler(collector)
    split = Folder(16, 0, root=root, validation_fraction=0, max_unreadable=max_unreadable).split("train")
    order = ShuffledBatches(len(split), 8, 0, comm.rank(), comm.world_size())
    taken, message = 0, ""
    try:
        for _ in train_batches(split, order, start=0, steps=steps, workers=workers, sync_every=every):
            taken += 1
    except UserError as error:
        message = str(error)
    return taken, message, collector.lines, split.read_errors.flags.nonzero().flatten().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_count_together(image_folder, workers):
    """Seven may be unreadable and eight are; neither process sees more than six of them."""
    results = run_processes(2, train_and_collect, image_folder, 0.19, workers, 5, 5, may_fork=True)
    for taken, message, _, unreadable in results:
        assert taken == 5
        assert message == f"data.max_unreadable=0.19: 8 of the 40 train images in '{image_folder}' cannot be read"
        assert unreadable == list(BROKEN)
    first, other = (lines for _, _, lines, _ in results)
    assert other == []
    for i in BROKEN:
        assert (
            sum(line.split("] ")[-1].startswith(f"data.root: cannot read '{i:02}.png' (not a") for line in first) >= 1
        )
    assert any(line.startswith("[process 1] data.root: cannot read") for line in first)
    assert first[-1] == "data.root: cannot read " + ", ".join(f"'{i:02}.png'" for i in BROKEN)


def test_other_processes_do_not_retry_an_unreadable_image(image_folder):
    """After an epoch every process knows all of them, and none is logged again."""
    results = run_processes(2, train_and_collect, image_folder, 0.5, 0, 20, 5)
    lines = results[0][2]
    assert [result[0] for result in results] == [20, 20]
    assert 8 <= len(lines) <= 16  # both log an image that both read in the first epoch
    one_epoch = run_processes(2, train_and_collect, image_folder, 0.5, 0, 5, 5)
    assert one_epoch[0][2] == lines


def validate_and_collect(root):
    """Return the logged lines and the number of unreadable images after reading a validation split."""
    collector, log = LogCollector(), logging.getLogger("vqf")
    log.addHandler(collector)
    split = Folder(16, 0, root=root, validation_fraction=1, max_unreadable=0.5).split("validation")
    for _ in sequential_batches(split, 4):
        pass
    return collector.lines, int(split.read_errors.flags.sum())


def test_unreadable_validation_images_are_counted_too(image_folder):
    (lines, count), (none, other) = run_processes(2, validate_and_collect, image_folder)
    assert (count, other, none) == (8, 8, [])
    assert len({line.split("'")[1] for line in lines}) == 8


def stop_on_rank_1(root):
    """Rank 1 finds too many by itself; its log lines still reach rank 0."""
    collector, log = LogCollector(), logging.getLogger("vqf")
    log.addHandler(collector)
    split = Folder(16, 0, root=root, validation_fraction=0, max_unreadable=0.03).split("train")
    if comm.is_main():
        comm.barrier()
        flush_relayed()
        return collector.lines
    with suppress(UserError):
        order = ShuffledBatches(len(split), 40, 0)
        list(train_batches(split, order, start=0, steps=1, workers=0))
    comm.barrier()
    return collector.lines


def test_rank_0_logs_what_stops_another_rank(image_folder):
    first, other = run_processes(2, stop_on_rank_1, image_folder)
    assert not other
    assert first[0].startswith("[process 1] data.root: cannot read '")
    assert first[-1].count("'") == 4  # all that were known: the one that is allowed, and the one too many


def count_in_a_union(root):
    node = {"name": "folder", "root": root, "validation_fraction": 0, "max_unreadable": 0.19}
    split = Union(16, 0, parts={"a": node, "b": {**node, "max_unreadable": 1}}).split("train")
    for index in range(comm.rank(), 40, 2):
        with suppress(UserError):
            split.item(0, index)
    for flag in split.read_error_flags()[:1]:
        flag[[1, 5, 9, 13] if comm.is_main() else [17, 21, 25, 29]] = True
    try:
        sync_read_errors(split)
    except UserError as error:
        return str(error)
    return ""


def test_every_source_of_a_union_counts_its_own(image_folder):
    for message in run_processes(2, count_in_a_union, image_folder):
        assert message.startswith("data.parts.a.max_unreadable=0.19: 8 of the 40 train images")

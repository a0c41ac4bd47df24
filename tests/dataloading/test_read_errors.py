"""What could not be read is counted over all processes of a run, and named by the first."""

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
    """Forty image_folder, of which eight are broken."""
    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(b"broken" if i in BROKEN else png((i, 0, 0)))
    return str(tmp_path)


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def trained(root, max_unreadable, workers, steps, every):
    """Return how many steps were taken, what stopped them, and what this process has said."""
    heard, log = Heard(), logging.getLogger("vqf")
    log.addHandler(heard)
    split = Folder(16, 0, root=root, validation_fraction=0, max_unreadable=max_unreadable).split("train")
    order = ShuffledBatches(len(split), 8, 0, comm.rank(), comm.world_size())
    taken, words = 0, ""
    try:
        for _ in train_batches(split, order, start=0, steps=steps, workers=workers, sync_every=every):
            taken += 1
    except UserError as error:
        words = str(error)
    return taken, words, heard.lines, split.unreadable.nonzero().flatten().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_count_together(image_folder, workers):
    """Seven may be bad and eight are, none of the processes sees more than six of them."""
    found = run_processes(2, trained, image_folder, 0.19, workers, 5, 5, may_fork=True)
    for taken, words, _, bad in found:
        assert taken == 5
        assert words == f"data.max_unreadable=0.19: 8 of the 40 train images in '{image_folder}' cannot be read"
        assert bad == list(BROKEN)
    first, other = (lines for _, _, lines, _ in found)
    assert other == []
    for i in BROKEN:
        assert (
            sum(line.split("] ")[-1].startswith(f"data.root: cannot read '{i:02}.png' (not a") for line in first) >= 1
        )
    assert any(line.startswith("[process 1] data.root: cannot read") for line in first)
    assert first[-1] == "data.root: cannot read " + ", ".join(f"'{i:02}.png'" for i in BROKEN)


def test_what_one_process_could_not_read_the_others_do_not_try(image_folder):
    """After an epoch everybody knows all of them, so that nobody names one again."""
    found = run_processes(2, trained, image_folder, 0.5, 0, 20, 5)
    lines = found[0][2]
    assert [each[0] for each in found] == [20, 20]
    assert 8 <= len(lines) <= 16  # one that two processes met in the first epoch is named by both
    once = run_processes(2, trained, image_folder, 0.5, 0, 5, 5)
    assert once[0][2] == lines


def looked(root):
    """What is left of a look at images."""
    heard, log = Heard(), logging.getLogger("vqf")
    log.addHandler(heard)
    split = Folder(16, 0, root=root, validation_fraction=1, max_unreadable=0.5).split("validation")
    for _ in sequential_batches(split, 4):
        pass
    return heard.lines, int(split.unreadable.sum())


def test_a_look_at_held_out_images_tells_too(image_folder):
    (lines, count), (none, other) = run_processes(2, looked, image_folder)
    assert (count, other, none) == (8, 8, [])
    assert len({line.split("'")[1] for line in lines}) == 8


def stopped(root):
    """One process finds too many by itself; what it had to say reaches the first all the same."""
    heard, log = Heard(), logging.getLogger("vqf")
    log.addHandler(heard)
    split = Folder(16, 0, root=root, validation_fraction=0, max_unreadable=0.03).split("train")
    if comm.is_main():
        comm.barrier()
        flush_relayed()
        return heard.lines
    with suppress(UserError):
        order = ShuffledBatches(len(split), 40, 0)
        list(train_batches(split, order, start=0, steps=1, workers=0))
    comm.barrier()
    return heard.lines


def test_what_stops_another_process_is_named_by_the_first(image_folder):
    first, other = run_processes(2, stopped, image_folder)
    assert not other
    assert first[0].startswith("[process 1] data.root: cannot read '")
    assert first[-1].count("'") == 4  # all that were known: the one that may be bad, and the one too many


def united(root):
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


def test_the_sources_of_a_union_count_each(image_folder):
    for words in run_processes(2, united, image_folder):
        assert words.startswith("data.parts.a.max_unreadable=0.19: 8 of the 40 train images")

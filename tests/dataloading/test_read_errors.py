"""What could not be read is counted over all processes of a run, and named by the first."""

import logging
from contextlib import suppress

import pytest

from tests.data.packing import png
from tests.support.processes import together
from vqf.data.folder import Folder
from vqf.data.union import Union
from vqf.dataloading.loader import batches, sequential
from vqf.dataloading.order import Order
from vqf.dataloading.read_errors import agree
from vqf.distributed import comm
from vqf.distributed.log_relay import pass_on
from vqf.errors import UserError

BROKEN = (1, 5, 9, 13, 17, 21, 25, 29)


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures, of which eight are broken."""
    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(b"broken" if i in BROKEN else png((i, 0, 0)))
    return str(tmp_path)


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def trained(root, max_bad, workers, steps, every):
    """Return how many steps were taken, what stopped them, and what this process has said."""
    heard, log = Heard(), logging.getLogger("vqf")
    log.addHandler(heard)
    split = Folder(16, 0, root=root, validation_share=0, max_bad=max_bad).split("train")
    order = Order(len(split), 8, 0, comm.rank(), comm.world())
    taken, words = 0, ""
    try:
        for _ in batches(split, order, start=0, steps=steps, workers=workers, every=every):
            taken += 1
    except UserError as error:
        words = str(error)
    return taken, words, heard.lines, split.bad.nonzero().flatten().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_count_together(pictures, workers):
    """Seven may be bad and eight are, none of the processes sees more than six of them."""
    found = together(2, trained, pictures, 0.19, workers, 5, 5, parents=True)
    for taken, words, _, bad in found:
        assert taken == 5
        assert words == f"data.max_bad=0.19: 8 of the 40 train pictures in '{pictures}' cannot be read"
        assert bad == list(BROKEN)
    first, other = (lines for _, _, lines, _ in found)
    assert other == []
    for i in BROKEN:
        assert (
            sum(line.split("] ")[-1].startswith(f"data.root: cannot read '{i:02}.png' (not a") for line in first) >= 1
        )
    assert any(line.startswith("[process 1] data.root: cannot read") for line in first)
    assert first[-1] == "data.root: cannot read " + ", ".join(f"'{i:02}.png'" for i in BROKEN)


def test_what_one_process_could_not_read_the_others_do_not_try(pictures):
    """After an epoch everybody knows all of them, so that nobody names one again."""
    found = together(2, trained, pictures, 0.5, 0, 20, 5)
    lines = found[0][2]
    assert [each[0] for each in found] == [20, 20]
    assert 8 <= len(lines) <= 16  # one that two processes met in the first epoch is named by both
    once = together(2, trained, pictures, 0.5, 0, 5, 5)
    assert once[0][2] == lines


def looked(root):
    """What is left of a look at pictures."""
    heard, log = Heard(), logging.getLogger("vqf")
    log.addHandler(heard)
    split = Folder(16, 0, root=root, validation_share=1, max_bad=0.5).split("validation")
    for _ in sequential(split, 4):
        pass
    return heard.lines, int(split.bad.sum())


def test_a_look_at_held_out_pictures_tells_too(pictures):
    (lines, count), (none, other) = together(2, looked, pictures)
    assert (count, other, none) == (8, 8, [])
    assert len({line.split("'")[1] for line in lines}) == 8


def stopped(root):
    """One process finds too many by itself; what it had to say reaches the first all the same."""
    heard, log = Heard(), logging.getLogger("vqf")
    log.addHandler(heard)
    split = Folder(16, 0, root=root, validation_share=0, max_bad=0.03).split("train")
    if comm.first():
        comm.wait()
        pass_on()
        return heard.lines
    with suppress(UserError):
        order = Order(len(split), 40, 0)
        list(batches(split, order, start=0, steps=1, workers=0))
    comm.wait()
    return heard.lines


def test_what_stops_another_process_is_named_by_the_first(pictures):
    first, other = together(2, stopped, pictures)
    assert not other
    assert first[0].startswith("[process 1] data.root: cannot read '")
    assert first[-1].count("'") == 4  # all that were known: the one that may be bad, and the one too many


def united(root):
    node = {"name": "folder", "root": root, "validation_share": 0, "max_bad": 0.19}
    split = Union(16, 0, parts={"a": node, "b": {**node, "max_bad": 1}}).split("train")
    for index in range(comm.rank(), 40, 2):
        with suppress(UserError):
            split.item(0, index)
    for flag in split.faults()[:1]:
        flag[[1, 5, 9, 13] if comm.first() else [17, 21, 25, 29]] = True
    try:
        agree(split)
    except UserError as error:
        return str(error)
    return ""


def test_the_sources_of_a_union_count_each(pictures):
    for words in together(2, united, pictures):
        assert words.startswith("data.parts.a.max_bad=0.19: 8 of the 40 train pictures")

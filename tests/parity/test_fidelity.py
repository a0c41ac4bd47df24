"""docs/fidelity.md, and the measure that everything in it is made with."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity.comparisons import TOLERANCE, Comparison, Gap, Results, declared, difference, distance
from tests.parity.fidelity import PAGE, listed, write
from tests.parity.peers import need

NUMBER = re.compile(r"(equal|\de-\d\d)(, peer \de-\d\d)?")


def test_the_page_lists_the_comparisons_that_exist() -> None:
    """Each with a number for every dtype that it is made in. Not which digits: another processor rounds otherwise."""
    found, wanted = listed(), declared()
    assert {comparison: row.how for comparison, row in found.items()} == {
        comparison: about.how for comparison, about in wanted.items()
    }
    for comparison, about in wanted.items():
        numbers = found[comparison].numbers
        assert set(numbers) == set(about.dtypes), comparison
        for dtype, number in numbers.items():
            assert (shown := NUMBER.fullmatch(number)), comparison
            assert shown[2] or number == "equal" or float(number) <= TOLERANCE[dtype], comparison


def complete() -> Results:
    return {(comparison, dtype): Gap(2e-12) for comparison, about in declared().items() for dtype in about.dtypes}


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page, results = tmp_path / "fidelity.md", complete()
    shutil.copy(PAGE, page)
    write(results, page)
    assert {number for row in listed(page).values() for number in row.numbers.values()} == {"2e-12"}
    assert listed(page).keys() == declared().keys()
    before, lost = page.read_text(), next(iter(results))
    del results[lost]
    with pytest.raises(ValueError, match=re.escape(f"1 numbers are missing, the first is of {lost[0].part}")):
        write(results, page)
    with pytest.raises(ValueError, match="stays as it is"):
        write({}, page)
    assert page.read_text() == before


def test_the_command_prints_what_it_measures_and_keeps_a_page_that_it_cannot_fill() -> None:
    need("taming")
    before = PAGE.read_text()
    command = [sys.executable, "-m", "tests.parity", "-k", "test_older_class"]
    done = subprocess.run(command, cwd=PAGE.parents[1], capture_output=True, text=True, check=True)
    assert PAGE.read_text() == before
    rows = [line for line in done.stdout.splitlines() if line.startswith("| quantizer `vq`")]
    assert [NUMBER.fullmatch(row.split(" | ")[-1].rstrip(" |")) is not None for row in rows] == [True, True], (
        done.stdout
    )
    assert "fidelity.md stays as it is" in done.stdout


def test_every_layer_has_its_own_scale() -> None:
    theirs = {"a.weight": torch.tensor([100.0]), "a.bias": torch.tensor([1.0]), "b.weight": torch.tensor([1e-6])}
    assert difference({**theirs, "a.bias": torch.tensor([1.1])}, theirs) == pytest.approx(1e-3)
    assert difference({**theirs, "b.weight": torch.tensor([2e-6])}, theirs) == pytest.approx(1.0)
    assert difference(theirs, theirs) == 0.0


def test_the_distance_is_that_of_all_tensors_as_one_vector() -> None:
    truth = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert distance({"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])}, truth) == pytest.approx(0.1)


def test_one_wrong_index_is_seen() -> None:
    indices = torch.arange(1000)
    assert difference(indices + (indices == 3), indices) > 1e-4


@pytest.mark.parametrize(
    "ours",
    [torch.ones(3), torch.ones(2, dtype=torch.float32), torch.full((2,), torch.nan, dtype=torch.float64)],
    ids=["shape", "dtype", "not a number"],
)
def test_what_cannot_be_compared_is_refused(ours: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        difference(ours, torch.ones(2, dtype=torch.float64))


def test_names_must_agree() -> None:
    with pytest.raises(AssertionError, match="only one side"):
        difference({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_a_comparison_is_named_once() -> None:
    assert Comparison("a", "b", "c", exact=True) == Comparison("a", "b", "c")

"""python -m tests.parity: run every comparison, print the table, and write docs/fidelity.md.

Words behind it go to pytest, as in `python -m tests.parity -k lpips`: the rows that this measures are printed, and the
page, which needs all of them, stays as it is.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.parity import fidelity
from tests.parity.comparisons import RESULTS, Results


class Table:
    """Keeps what a run has measured."""

    results: Results

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.results = session.config.stash[RESULTS]


def main(words: list[str]) -> int:
    os.environ["VQF_PEERS"] = "1"  # a table with holes would say less than it seems to
    table = Table()
    # The page may lag behind until it is written, below.
    ignored = f"--ignore={Path(__file__).with_name('test_fidelity.py')}"
    # Not by xdist, whose workers would keep what they measure to themselves.
    options = ["-q", "-n0", "-m", "", "-p", "no:cacheprovider", ignored, *words]
    status = pytest.main([str(Path(__file__).parent), *options], plugins=[table])
    if status != pytest.ExitCode.OK:
        return int(status)
    print(fidelity.tables(table.results))
    try:
        fidelity.write(table.results)
    except ValueError as error:
        print(error)
        return 0 if words else 1  # all of it was asked for
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""python -m tests.parity: run every comparison, print the table, and write docs/fidelity.md."""

import os
import sys
from pathlib import Path

import pytest

from tests.parity import fidelity
from tests.parity.comparisons import RESULTS


class Table:
    """Keeps what a run has measured."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.results = session.config.stash[RESULTS]


def main() -> int:
    os.environ["VQF_PEERS"] = "1"  # a table with holes would say less than it seems to
    table = Table()
    # The page may lag behind until it is written, below.
    ignored = f"--ignore={Path(__file__).with_name('test_fidelity.py')}"
    status = pytest.main([str(Path(__file__).parent), ignored, "-q", "-p", "no:cacheprovider"], plugins=[table])
    if status == pytest.ExitCode.OK:
        fidelity.write(table.results)
        print(fidelity.tables(table.results))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

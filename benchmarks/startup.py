"""Time to list a large dataset at the start of a run: `python benchmarks/startup.py`.

Scans and splits a folder of empty files in a hundred classes, and reads the indexes of shards with as many samples,
each with an image, a label and a `.json`. No image is opened.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vqf import terminal
from vqf.data.files.listing import scan
from vqf.data.folder import Folder
from vqf.data.images.decode import EXTENSIONS
from vqf.data.shards import Shards
from vqf.data.tar.index_file import TarIndex, TarMember, index_path, write_index

CLASSES = 100
SHARD = 2500  # samples


def make_folder(root: Path, count: int) -> None:
    """Write empty files into the folders of classes."""
    for each in range(CLASSES):
        folder = root / "train" / f"n{each:08d}"
        folder.mkdir(parents=True)
        for i in range(count // CLASSES):
            (folder / f"n{each:08d}_{i}.JPEG").touch()


def make_indices(root: Path, count: int) -> None:
    """Write the indices of shards that hold nothing."""
    root.mkdir()
    for first in range(0, count, SHARD):
        tar = root / f"train-{first // SHARD:06d}.tar"
        tar.write_bytes(bytes(1024))
        state = tar.stat()
        members = [member for i in range(first, first + SHARD) for member in _sample(i)]
        write_index(TarIndex(state.st_size, state.st_mtime_ns, True, members), index_path(tar, None))


def _sample(number: int) -> list[TarMember]:
    key, offset = f"{number:08d}", number % SHARD * 120_000
    label = TarMember(key, "cls", offset + 112_000, 3, 1_234_567, str(number % CLASSES))
    return [
        TarMember(key, "jpg", offset, 110_000, 12_345_678),
        TarMember(key, "json", offset + 111_000, 60, 123_456),
        label,
    ]


def least(action: Callable[[], object], rounds: int) -> float:
    """Return the fewest seconds of the processor that an action takes."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, shards = Path(place) / "folder", Path(place) / "shards"
        make_folder(folder, given.count)
        make_indices(shards, given.count)
        jobs = {
            "scan a folder": lambda: scan(folder, EXTENSIONS),
            "data=folder": lambda: Folder(64, 0, root=str(folder)).split("train"),
            "data=shards": lambda: Shards(64, 0, root=str(shards), validation=None).split("train"),
        }
        rows = [(name, f"{least(job, given.rounds):.2f}") for name, job in jobs.items()]
    terminal.print_table(f"{given.count:,} images", ("", "seconds"), rows)


if __name__ == "__main__":
    main()

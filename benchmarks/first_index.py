"""Time to index new shards with several processes: `torchrun --nproc-per-node 2 benchmarks/first_index.py`.

On first use every shard is read in full. Processes that all start at the first shard repeat each other's work;
processes that start at different shards find the indexes of the others. Both are timed in turns, on the same shards.
"""

import argparse
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

from vqf import terminal
from vqf.data.tar.contents import load_indices
from vqf.data.tar.index_file import INDEX_SUFFIX
from vqf.distributed import comm
from vqf.distributed.process_group import process_group

BYTES = 100_000  # of an image: about a JPEG of 512 px


def make_shards(folder: Path, shards: int, images: int) -> list[Path]:
    """Write shards of random bytes with labels."""
    content = os.urandom(BYTES)
    paths = [folder / f"train-{i:06d}.tar" for i in range(shards)]
    for path in paths:
        with tarfile.open(path, "w:") as tar:
            for i in range(images):
                for name, data in ((f"{i:06d}.jpg", content), (f"{i:06d}.cls", b"1")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


def timed(paths: list[Path], shared: bool) -> tuple[float, float]:
    """Index the shards in every process; returns the seconds until all are ready, and those of all processors."""
    if comm.is_main():
        for path in paths:
            path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)
    comm.barrier()
    began, busy = time.perf_counter(), time.process_time()
    with mock.patch.object(comm, "rank", comm.rank if shared else lambda: 0):
        load_indices(paths, None)
    mine = time.process_time() - busy
    comm.barrier()
    return time.perf_counter() - began, sum(comm.all_gather_object(mine))


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--images", type=int, default=500, help="of a shard")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with process_group(), tempfile.TemporaryDirectory() as place:
        folder = Path(comm.broadcast_object(place))
        paths = comm.broadcast_object(make_shards(folder, given.shards, given.images) if comm.is_main() else [])
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(given.rounds):
            for shared in found:
                found[shared].append(timed(paths, shared))
        comm.barrier()
        if comm.is_main():
            names = {False: "all from the first", True: "each from another"}
            rows = [
                (names[key], *(f"{median(each):.2f}" for each in zip(*rounds, strict=True)))
                for key, rounds in found.items()
            ]
            title = f"{given.shards} shards of {given.images * BYTES / 1e6:.0f} MB, {comm.world_size()} processes"
            terminal.print_table(title, ("", "seconds", "of all processors"), rows)


if __name__ == "__main__":
    main()

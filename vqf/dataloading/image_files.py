"""What pipelines do with data sources whose images are files, spread over processes."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from omegaconf import DictConfig
from PIL import Image

from vqf.batch import Size
from vqf.config.access import image_size
from vqf.errors import EmptySplitError, UserError
from vqf.protocols import Data, Split
from vqf.registry import build
from vqf.terminal import log

T = TypeVar("T")
R = TypeVar("R")

SPLITS = ("train", "validation")


class ImageFileLike(Protocol):
    """An image as a file. Every method raises a ValueError, or an OSError, if it cannot be read."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> int | None: ...

    def read_bytes(self) -> bytes: ...  # the file

    def load_image(self) -> Image.Image: ...  # whole, upright, RGB

    def probe(self, content: bytes) -> tuple[str, str, int, int]: ...  # format, mode, width, height


@runtime_checkable
class PairFileLike(ImageFileLike, Protocol):
    """An image with a map beside it."""

    def read_map(self) -> tuple[bytes, str]: ...  # the file, and its format

    # Whole, upright, in a mode that PNG keeps; of an image of so many rows and columns.
    def load_map(self, shape: Size) -> Image.Image: ...


@runtime_checkable
class ImageFileSplit(Protocol):
    """A split whose images are files, which can be had as they are."""

    names: Sequence[str]

    def file(self, index: int) -> ImageFileLike: ...


@runtime_checkable
class ConcatSplit(Protocol):
    """A split made of others; the label of an image says of which it is."""

    source_names: Sequence[str]
    source_labels: Sequence[int]  # their labels
    splits: Sequence[Split]

    def locate(self, index: int) -> tuple[int, int]: ...  # which of them, and the image's number there


@runtime_checkable
class StreamedShardSplit(Protocol):
    """A split whose images are files in shards, each of which can only be read from end to end."""

    urls: Sequence[str]

    @property
    def broken_shard_limit(self) -> int: ...  # how many of them may be missing or broken

    def display_url(self, shard: int) -> str: ...  # as it may be shown

    def iter_files(self, shard: int) -> Iterator[ImageFileLike]: ...  # a ValueError in the end if more should follow


class SampleLocation(NamedTuple):
    """Where an image is, however often its source was joined with others."""

    split: Split
    local_index: int
    name: str  # which tells nothing of the machine that it is on
    source_label: int | None = None  # which becomes its label


def locate(split: Split, index: int) -> SampleLocation:
    """Return where an image of a split is."""
    if isinstance(split, ConcatSplit):
        source, number = split.locate(index)
        found = locate(split.splits[source], number)
        name = f"{split.source_names[source]}/{found.name}"
        return found._replace(name=name, source_label=split.source_labels[source])
    names = getattr(split, "names", None)
    name = str(index) if names is None else str(names[index])
    return SampleLocation(split, index, Path(name).name if os.path.isabs(name) else name)


def flatten_sources(split: Split, option: str = "data") -> list[tuple[str, Split]]:
    """Return what a split is made of, each with the place of its options: itself, where it was not joined."""
    if not isinstance(split, ConcatSplit):
        return [(option, split)]
    parts = zip(split.source_names, split.splits, strict=True)
    return [each for name, part in parts for each in flatten_sources(part, f"{option}.parts.{name}")]


def open_splits(config: DictConfig) -> tuple[Data, dict[str, Split]]:
    """Build the data of a config, and the parts of it that hold images.

    Raises:
        UserError: If there is no data, or none of it holds an image.
    """
    if config.data is None:
        raise UserError("data: none is chosen; give data=folder data.root=... or another")
    data: Data = build("data", config.data, image_size=image_size(config), seed=config.seed)
    parts, empty = {}, None
    for name in SPLITS:
        try:
            parts[name] = data.split(name)
        except EmptySplitError as error:
            log.info("no %s images: %s", name, error)
            empty = error
    if not parts:
        raise empty or AssertionError("a split or a mistake")
    return data, parts


def process_map(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Do tasks, in so many processes or, with 0, in this one, and yield what each gives as it is done.

    Raises:
        UserError: If a process dies.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(workers, max(len(tasks), 1)), initializer=_init_worker, initargs=(work,)) as pool:
        waiting: list[Future[R]] = [pool.submit(_run_task, task) for task in tasks]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(f"workers={workers}: a worker process died (out of memory?); try fewer of them") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_function: Callable[[Any], Any]


def _init_worker(work: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = work
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the processes side by side share the cores


def _exit_with_parent() -> None:
    """End this process when its parent was killed: the pool would wait for work for ever, or go on with what it had."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of a pool"
    parent.join()
    os._exit(1)


def _run_task(task: Any) -> Any:
    return _worker_function(task)

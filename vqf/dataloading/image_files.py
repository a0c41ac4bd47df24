"""What pipelines do with data sources whose pictures are files, spread over processes."""

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
from vqf.errors import EmptyPartError, UserError
from vqf.protocols import Data, Split
from vqf.registry import build
from vqf.terminal import log

T = TypeVar("T")
R = TypeVar("R")

PARTS = ("train", "validation")


class PictureFile(Protocol):
    """A picture as a file. Every method raises a ValueError, or an OSError, if it cannot be read."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> int | None: ...

    def stored(self) -> bytes: ...  # the file

    def picture(self) -> Image.Image: ...  # whole, upright, RGB

    def facts(self, content: bytes) -> tuple[str, str, int, int]: ...  # format, mode, width, height


@runtime_checkable
class PairFile(PictureFile, Protocol):
    """A picture with a map beside it."""

    def stored_map(self) -> tuple[bytes, str]: ...  # the file, and its format

    # Whole, upright, in a mode that PNG keeps; of a picture of so many rows and columns.
    def map(self, shape: Size) -> Image.Image: ...


@runtime_checkable
class Files(Protocol):
    """A split whose pictures are files, which can be had as they are."""

    names: Sequence[str]

    def file(self, index: int) -> PictureFile: ...


@runtime_checkable
class Joined(Protocol):
    """A split made of others; the label of a picture says of which it is."""

    sources: Sequence[str]
    numbers: Sequence[int]  # their labels
    parts: Sequence[Split]

    def find(self, index: int) -> tuple[int, int]: ...  # which of them, and the picture's number there


@runtime_checkable
class Streams(Protocol):
    """A split whose pictures are files in shards, each of which can only be read from end to end."""

    urls: Sequence[str]

    @property
    def shard_tolerance(self) -> int: ...  # how many of them may be missing or broken

    def address(self, shard: int) -> str: ...  # as it may be shown

    def files(self, shard: int) -> Iterator[PictureFile]: ...  # a ValueError in the end if more should follow


class Place(NamedTuple):
    """Where a picture is, however often its source was joined with others."""

    split: Split
    number: int
    name: str  # which tells nothing of the machine that it is on
    source: int | None = None  # which becomes its label


def place_of(split: Split, index: int) -> Place:
    """Return where a picture of a split is."""
    if isinstance(split, Joined):
        source, number = split.find(index)
        found = place_of(split.parts[source], number)
        return found._replace(name=f"{split.sources[source]}/{found.name}", source=split.numbers[source])
    names = getattr(split, "names", None)
    name = str(index) if names is None else str(names[index])
    return Place(split, index, Path(name).name if os.path.isabs(name) else name)


def sources_of(split: Split, option: str = "data") -> list[tuple[str, Split]]:
    """Return what a split is made of, each with the place of its options: itself, where it was not joined."""
    if not isinstance(split, Joined):
        return [(option, split)]
    parts = zip(split.sources, split.parts, strict=True)
    return [each for name, part in parts for each in sources_of(part, f"{option}.parts.{name}")]


def open_parts(config: DictConfig) -> tuple[Data, dict[str, Split]]:
    """Build the data of a config, and the parts of it that hold pictures.

    Raises:
        UserError: If there is no data, or none of it holds a picture.
    """
    if config.data is None:
        raise UserError("data: none is chosen; give data=folder data.root=... or another")
    data: Data = build("data", config.data, image_size=image_size(config), seed=config.seed)
    parts, empty = {}, None
    for name in PARTS:
        try:
            parts[name] = data.split(name)
        except EmptyPartError as error:
            log.info("no %s pictures: %s", name, error)
            empty = error
    if not parts:
        raise empty or AssertionError("a split or a mistake")
    return data, parts


def spread(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Do tasks, in so many processes or, with 0, in this one, and yield what each gives as it is done.

    Raises:
        UserError: If a process dies.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(workers, max(len(tasks), 1)), initializer=_begin, initargs=(work,)) as pool:
        waiting: list[Future[R]] = [pool.submit(_do, task) for task in tasks]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(f"workers={workers}: a worker process died (out of memory?); try fewer of them") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the processes side by side share the cores


def _end_with_parent() -> None:
    """End this process when its parent was killed: the pool would wait for work for ever, or go on with what it had."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of a pool"
    parent.join()
    os._exit(1)


def _do(task: Any) -> Any:
    return _work(task)

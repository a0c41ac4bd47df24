"""What pipelines do with data sources whose pictures are files, spread over processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from omegaconf import DictConfig
from PIL import Image

from vqf.errors import UserError
from vqf.pipelines.common import image_size
from vqf.protocols import Data, Split
from vqf.registry import build
from vqf.terminal import log

T = TypeVar("T")
R = TypeVar("R")

PARTS = ("train", "validation")


@runtime_checkable
class Files(Protocol):
    """A split whose pictures are files, which can be had as they are. Every method raises a ValueError if not."""

    names: Sequence[str]

    def stored(self, index: int) -> bytes: ...  # the file

    def picture(self, index: int) -> Image.Image: ...  # whole, upright, RGB

    def facts(self, index: int, content: bytes) -> tuple[str, str, int, int]: ...  # format, mode, width, height


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
        except UserError as error:
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
    torch.set_num_threads(1)  # the processes side by side share the cores


def _do(task: Any) -> Any:
    return _work(task)

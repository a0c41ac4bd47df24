"""Map a function over tasks in worker processes."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from vqf.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def process_map(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Yield the result of each task as soon as it is done, in no fixed order.

    Args:
        function: Must be picklable.
        workers: Worker processes; 0 runs the tasks in this process.

    Raises:
        UserError: If a worker process dies.
    """
    if workers == 0:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(min(workers, max(len(tasks), 1)), initializer=_init_worker, initargs=(function,)) as pool:
        futures: list[Future[R]] = [pool.submit(_run_task, task) for task in tasks]
        try:
            for done in as_completed(futures):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(f"workers={workers}: a worker process died (out of memory?); try fewer of them") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_function: Callable[[Any], Any]  # pickled once per worker instead of once per task


def _init_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = function
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the workers share the cores


def _exit_with_parent() -> None:
    """End this worker when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker of the pool"
    parent.join()
    os._exit(1)


def _run_task(task: Any) -> Any:
    return _worker_function(task)

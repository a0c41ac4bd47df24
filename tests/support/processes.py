"""Several processes of one run inside a test, connected by gloo as torchrun would connect them."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import torch

from vqf.distributed.process_group import process_group

PATIENCE = 900  # seconds


def run_processes(
    count: int,
    work: Callable[..., Any],
    *arguments: Any,
    initialized: bool = True,
    may_die: bool = False,
    may_fork: bool = False,
) -> list[Any]:
    """Run `work` in so many processes at once and return what each gives.

    Args:
        count: Of processes.
        work: A function at the top of a module, which every process imports.
        arguments: Pickled into every process.
        initialized: Whether the processes have found each other; otherwise they have only been told where to.
        may_die: Whether a process may die or fail: it gives what it last said, or "" if it could say nothing.
        may_fork: Whether a process may start others, as one that loads data by workers does.
    """
    context = _server_of(work)
    port = free_port()
    ends, processes = [], []
    for rank in range(count):
        told = torchrun_variables(rank, count, port)
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_process, args=(theirs, told, initialized, work, arguments), daemon=not may_fork
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    try:
        return [_received(end, may_die) for end in ends]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def compare_with_alone(work: Callable[[], dict[str, torch.Tensor]], alone: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Run `work` in two processes, which both give what one process gives alone; returns what they give.

    Args:
        work: See `run_processes`.
    """
    first, second = run_processes(2, work)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, alone[key], rtol=1e-12, atol=1e-12, msg=key)
    return first


def start_process(work: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start `work` in a process and a session of its own, and return it at once.

    Args:
        work: A function at the top of a module, which the process imports; it may start others.
        arguments: Pickled into the process.
    """
    process = _server_of(work).Process(target=_session, args=(work, arguments))
    process.start()
    return process


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun sets for a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in numbers.items()}}


def _server_of(work: Callable[..., Any]) -> Any:
    """Return the context whose processes are forks of one that has imported what most of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.processes", "tests.support.preloaded", work.__module__])
    return context


def _session(work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setsid()
    _prepare()
    work(*arguments)


def _prepare() -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # as in a process of torchrun: loaders fork, and import nothing


def _process(
    end: Connection, told: dict[str, str], initialized: bool, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update(told)
    _prepare()
    try:
        with process_group() if initialized else nullcontext():
            found = (work(*arguments), "")
    except BaseException:
        found = (None, traceback.format_exc())
    end.send_bytes(pickle.dumps(found))  # whole: tensors in shared memory would end with this process


def _received(end: Connection, may_die: bool) -> Any:
    assert end.poll(PATIENCE), "a process hangs"
    try:
        value, trouble = pickle.loads(end.recv_bytes())
    except EOFError:
        value, trouble = "", "" if may_die else "it died"
    if trouble and may_die:
        return trouble
    if trouble:
        raise AssertionError(f"in a process:\n{trouble}")
    return value

"""A process that is killed says nothing: the others name it."""

import os
import signal

import pytest

from tests.support.processes import run_processes
from vqf.distributed import comm
from vqf.distributed.peer_errors import explain_lost_peers, report_once


class LostError(Exception):
    """Carries out of a process what it says."""


def lose(who: int) -> None:
    """One process is killed; the others fail in a collective and say why."""
    if comm.rank() == who:
        os.kill(os.getpid(), signal.SIGKILL)
    said: list[str] = []
    try:
        while True:
            comm.barrier()
    except RuntimeError as error:
        message = explain_lost_peers(error)
        assert message and "\n" not in message
        report_once(lambda: said.append(message), message)
        raise LostError(f"{message} [reported by {len(said)}]") from error


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_is_named_by_the_others(who: int) -> None:
    said = run_processes(3, lose, who, may_die=True)
    assert said[who] == ""
    others = [text for rank, text in enumerate(said) if rank != who]
    assert all(f"process {who} of 3 has ended without a message: it was killed" in text for text in others)
    assert sorted(text.split("[reported by ")[-1][0] for text in others) == ["0", "1"], "one of them prints"


def break_alone() -> None:
    if comm.rank() == 1:
        raise ValueError("a mistake of this process")
    try:
        while True:
            comm.barrier()
    except RuntimeError as error:
        raise LostError(explain_lost_peers(error)) from error


def test_a_process_that_fails_gives_its_own_reason() -> None:
    first, _ = run_processes(2, break_alone, may_die=True)
    assert "LostError: a mistake of this process" in first


def test_a_bug_is_no_lost_process() -> None:
    assert explain_lost_peers(RuntimeError("shapes differ")) is None

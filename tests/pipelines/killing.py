"""Kill a run in a process of its own with SIGKILL, again and again, and resume it each time.

    python -m tests.pipelines.killing '[{"name": "a", "command": [...], "steps": 30, "kills": 20, "seed": 1}]' FOLDER

Importing torch and vqf takes seconds, so this process does it once; every run is a fork of it, made before it starts a
thread. Prints a line of JSON per job, with what each kill interrupted. A run is killed

* in the start: a random time after the fork;
* in a step: when its log has reached a random step, and a random part of a step later;
* in a save: within milliseconds of the moment at which a checkpoint's temporary folder appears;
* at the end: after the last step, while it evaluates, saves and writes its report.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tests.support.preloaded  # noqa: F401
from vqf import run as command_line

MOMENTS = ("start", "start", "start", "step", "step", "step", "step", "save", "save", "save", "save")  # how often each
PATIENCE = 300.0  # seconds that a run may take to reach the moment of its kill
POLL = 0.001


@dataclass
class Job:
    """A run to kill `kills` times."""

    name: str
    command: list[str]
    steps: int
    kills: int
    seed: int
    whole: bool = True  # whether each fork composes its config, as a fresh process does
    killed: list[str] = field(default_factory=list)


class Killer:
    """Runs a command in forks of this process."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.run = job, folder / job.name
        self.random = random.Random(job.seed)
        self.took = 0.5  # seconds of the last start
        self.sessions: list[int] = []
        self.read = (0, 0)  # bytes of the log and the step that they come to

    def __call__(self) -> None:
        """Run the command once uninterrupted, then again with all its kills."""
        self.finish(self.run.with_name(f"{self.job.name}-whole"))
        targets = sorted(self.random.randrange(self.job.steps) for _ in range(self.job.kills - 1))
        for target in [*targets, self.job.steps]:
            moment = "end" if target == self.job.steps else self.random.choice(MOMENTS)
            while not self.kill(moment, target):
                assert len(self.sessions) < 3 * self.job.kills, "it ends before it can be killed"
                moment = "start"  # the run is finished: the next process saves nothing
        self.finish(self.run)
        for session in self.sessions:  # loader workers that have not noticed the death of their parent
            try:
                os.killpg(session, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def finish(self, run: Path) -> None:
        """Let the command run to its end."""
        pid = self.fork(run)
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"{run}: {(run.parent / f'{run.name}.txt').read_text()[-3000:]}"

    def kill(self, moment: str, target: int) -> bool:
        """Start the command and kill it at a moment, after `target` steps at the earliest.

        Returns whether it was still running.
        """
        began = time.monotonic()
        pid = self.fork(self.run)
        reached = {
            "start": lambda: True,
            "step": lambda: self.steps() >= target,
            "save": lambda: self.saves(pid, target),
            "end": lambda: self.steps() >= target,
        }[moment]
        self.wait(pid, reached)
        if moment == "start":
            until = began + self.random.uniform(0, self.took)
            self.wait(pid, lambda: time.monotonic() >= until)
        else:
            self.took = min(time.monotonic() - began, 5.0)
            time.sleep(self.random.uniform(0, {"step": 0.05, "save": 0.005, "end": 0.3}[moment]))
        during = "save" if self.saves(pid) else moment
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            self.took = (time.monotonic() - began) / 2  # a finished run ends soon after its start
            return False
        self.job.killed.append(f"{during} at step {self.steps()}")
        return True

    def wait(self, pid: int, reached: Callable[[], bool]) -> None:
        """Wait until `reached()` or the end of the process."""
        until = time.monotonic() + PATIENCE
        while not reached() and time.monotonic() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(POLL)

    def fork(self, run: Path) -> int:
        """Start the command in a process of its own."""
        pid = os.fork()
        if pid:
            self.sessions.append(pid)
            return pid
        os.setsid()
        output = os.open(run.parent / f"{run.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            sys.argv = ["vqf", *self.job.command, f"run_dir={run}", "resume=true"]
            status = _status(command_line.main if self.job.whole else _run)
        finally:
            os._exit(status)

    def steps(self) -> int:
        """Return the last logged step; the log is read again only when its size has changed."""
        path = self.run / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size != self.read[0]:
            self.read = (size, max((_step(line) for line in path.read_text().splitlines()), default=0))
        return self.read[1]

    def saves(self, pid: int, least: int = 0) -> bool:
        """Tell whether a process is writing a checkpoint of step `least` or later."""
        folders = (self.run / "checkpoints").glob(f".step-*.tmp-{pid}")
        return any(int(path.name.split(".")[1].removeprefix("step-")) >= least for path in folders)


def _status(run: Callable[[], Any]) -> int:
    try:
        run()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


_composed: dict[tuple[str, ...], Any] = {}


def _run() -> None:
    """Run the config that was composed before the fork, with its run folder set."""
    from omegaconf import open_dict

    from vqf.registry import build, flat_component

    *words, run_dir, _ = sys.argv[1:]
    config = _composed[tuple(words)].copy()
    with open_dict(config):
        config.run_dir, config.resume = run_dir.removeprefix("run_dir="), True
    build("pipeline", flat_component("pipeline", config), config=config, run_dir=Path(config.run_dir)).run()


def _compose(words: list[str]) -> None:
    from tests.support.composing import compose
    from vqf.config.settings import fill_missing_groups

    _composed[tuple(words)] = fill_missing_groups(compose(*words))


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return 0


def main() -> None:
    """Run the jobs."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    for each in json.loads(sys.argv[1]):
        job = Job(**each)
        if not job.whole:
            _compose(job.command)
        Killer(job, folder)()
        print(json.dumps({"name": job.name, "killed": job.killed}), flush=True)


if __name__ == "__main__":
    main()

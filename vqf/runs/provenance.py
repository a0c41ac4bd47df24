"""What a run costs: time, processor time, memory, and on what."""

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vqf.distributed import comm


class ResourceMeter:
    """Starts when it is made. Processor time is that of this process and of those it has waited for."""

    def __init__(self) -> None:
        self.start_time, self.start_cpu_seconds = time.monotonic(), _cpu_seconds()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.start_time

    def summary(self) -> dict[str, Any]:
        """Return what was used so far; memory is the most that the process has held since it started."""
        facts: dict[str, Any] = {
            "wall_seconds": round(self.elapsed_seconds, 1),
            "processor_seconds": round(_cpu_seconds() - self.start_cpu_seconds, 1),
            "processor": cpu_name(),
            "threads": torch.get_num_threads(),
            "processes": comm.world_size(),
            "peak_memory_bytes": _peak_memory(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            facts["accelerator"] = torch.cuda.get_device_name()
            facts["peak_accelerator_bytes"] = torch.cuda.max_memory_allocated()
        return facts


def cpu_name() -> str:
    """Return what the maker calls the processor, or its architecture."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(errors="replace").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git_commit() -> dict[str, str]:
    """Return the commit of the working directory as `git_commit`; nothing where git or a repository is absent.

    Whether files have changed since is not asked: to answer, git runs the filters that the folder's own config names,
    and the folder may be somebody else's.
    """
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-c", "core.fsmonitor=false", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, env=quiet)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": found.stdout.strip()} if found.returncode == 0 and found.stdout.strip() else {}


def command_line() -> str:
    """Return the command line that this process belongs to."""
    return shlex.join([*_launcher(), "-m", "vqf.run", *sys.argv[1:]])


def _launcher() -> list[str]:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", comm.world_size()))
    machines = [f"--nnodes={comm.world_size() // here}"] if comm.world_size() > here else []
    return ["python"] if comm.world_size() == 1 else ["torchrun", *machines, f"--nproc-per-node={here}"]

"""The provenance of a result: cost, hardware, command line and git commit."""

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
    """Measures a run from its construction on; CPU time includes finished children."""

    def __init__(self) -> None:
        self.start_time, self.start_cpu_seconds = time.monotonic(), _cpu_seconds()

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self.start_time

    def summary(self) -> dict[str, Any]:
        """Usage so far; peak memory since the start of the process."""
        usage: dict[str, Any] = {
            "wall_seconds": round(self.elapsed_seconds, 1),
            "processor_seconds": round(_cpu_seconds() - self.start_cpu_seconds, 1),
            "processor": cpu_name(),
            "threads": torch.get_num_threads(),
            "processes": comm.world_size(),
            "peak_memory_bytes": _peak_memory(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            usage["accelerator"] = torch.cuda.get_device_name()
            usage["peak_accelerator_bytes"] = torch.cuda.max_memory_allocated()
        return usage


def cpu_name() -> str:
    """Model name of the CPU, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def command_line() -> str:
    """The command that started this run, torchrun included."""
    return shlex.join([*_launcher(), "-m", "vqf.run", *sys.argv[1:]])


def git_commit() -> dict[str, str]:
    """{"commit": HEAD of the working directory}; empty without git.

    `git status` is avoided: it would run filters of a foreign repository's config.
    """
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-c", "core.fsmonitor=false", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": result.stdout.strip()} if result.returncode == 0 and result.stdout.strip() else {}


def _launcher() -> list[str]:
    if comm.world_size() == 1:
        return ["python"]
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", comm.world_size()))
    nodes = [f"--nnodes={comm.world_size() // per_node}"] if comm.world_size() > per_node else []
    return ["torchrun", *nodes, f"--nproc-per-node={per_node}"]


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""ResourceMeter against the clock and the operating system."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqf.runs.provenance import ResourceMeter

STATUS = Path("/proc/self/status")


def test_cpu_time_excludes_waiting() -> None:
    meter = ResourceMeter()
    time.sleep(0.3)
    before = time.process_time()
    while time.process_time() - before < 0.3:
        pass
    facts = meter.summary()
    assert 0.6 <= facts["wall_seconds"]
    assert 0.25 <= facts["processor_seconds"] <= facts["wall_seconds"] - 0.2


def test_cpu_time_of_ended_processes_counts() -> None:
    meter = ResourceMeter()
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert meter.summary()["processor_seconds"] >= 0.45


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux says so in a file")
def test_memory_is_the_peak() -> None:
    block = bytearray(2**26)
    del block
    said = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
    assert said is not None
    assert ResourceMeter().summary()["peak_memory_bytes"] == pytest.approx(int(said[1]) * 1024, rel=0.01)


def test_the_machine_is_named() -> None:
    facts = ResourceMeter().summary()
    assert facts["processor"]
    assert facts["threads"] >= 1
    assert facts["processes"] == 1

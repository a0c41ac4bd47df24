"""The command line in several processes: only the main one writes and prints; errors end all of them."""

import os
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import free_port, run_processes
from vqf.run import main

SLOW = pytest.mark.slow
RANK_PIPELINE = Path(__file__).parent / "support" / "rank_pipeline.py"
SMALL = [
    "pipeline=full",
    "model=small",
    "image_size=16",
    "batch_size=8",
    "steps=2",
    "ema=0.9",
    "model.encoder.channels=8",
    "model.decoder.channels=8",
    "model.quantizer.codebook_size=16",
    "model/loss=[l1]",
    "model.discriminator.channels=8",
    "model.prior.layers=1",
    "model.prior.heads=2",
    "model.prior.dim=16",
    "metric=[psnr]",
    "evaluate.count=9",
    "evaluate.samples=0",
    "log.every=1",
]


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def command(folder: str, arguments: list[str]) -> Ended:
    """Run a command line in this process, in a folder."""
    os.chdir(folder)
    out, err, status = StringIO(), StringIO(), 0
    sys.argv = ["vqf", *arguments]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception:
            status = 1
            traceback.print_exc()
    return Ended(status, out.getvalue(), err.getvalue())


def threads_left(folder: str, arguments: list[str]) -> list[str]:
    """Run a command line in this process, and return the threads of the group that are still there."""
    ended = command(folder, arguments)
    assert ended.status == 0, ended.err
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return [name for name in names if "gloo" in name]


def run_ranks(folder: Path, *arguments: str) -> list[Ended]:
    """Run the plugin's pipeline in two processes."""
    return run_processes(
        2, command, str(folder), [f"plugins=[{RANK_PIPELINE}]", "pipeline=ranks", *arguments], initialized=False
    )


def test_the_main_process_chooses_the_folder_and_prints(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, "do=warn", "who=1")
    (folder,) = tmp_path.glob("*/*/*")
    assert first == Ended(0, f"running in {folder.name}\n", "")
    assert second == Ended(0, "", "[process 1] a warning\n")
    assert sorted(path.name for path in folder.iterdir()) == [".hydra", "log.txt"]


@pytest.mark.parametrize("who", ["1", pytest.param("0", marks=SLOW), pytest.param("01", marks=SLOW)])
def test_a_mistake_is_one_line_whoever_makes_it(tmp_path: Path, who: str) -> None:
    ended = run_ranks(tmp_path, "do=refuse", f"who={who}")
    assert [each.status for each in ended] == [2, 2]
    (line,) = "".join(each.err for each in ended).splitlines()
    assert line in [f"process {each} refuses" for each in who]
    (log,) = tmp_path.glob("*/*/*/log.txt")
    assert log.read_text().splitlines()[-1].split("ERROR ")[1] in (line, f"process {who[0]} refuses")


def test_no_thread_outlives_the_group(tmp_path: Path) -> None:
    """A thread that frees a tensor while the interpreter exits would abort a finished process."""
    words = [*SMALL, "pipeline=stage1", "steps=1", "logger=[]", "engine=ddp", "device=cpu"]
    assert run_processes(2, threads_left, str(tmp_path), words, initialized=False) == [[], []]


def test_a_mistake_on_the_command_line_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, "steps=many")
    assert [each.status for each in ended] == [2, 2]
    assert "".join(each.err for each in ended) == "steps=many: must be an integer of at least 0\n"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback_and_nobody_hangs(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, "do=break", "who=1")
    assert second.status == 1 and second.err.endswith("IndexError: a bug in process 1\n")
    assert "Traceback" not in first.err and first.status == 2


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("pipeline=sample", "pipeline=sample runs in one process; start it without torchrun"),
        pytest.param(
            "engine=single", "engine=single: 2 processes were started; engine=ddp or fsdp2 uses them", marks=SLOW
        ),
        pytest.param(
            "device=cuda:1", "device=cuda:1: several processes need device=cuda, a GPU each, or device=cpu", marks=SLOW
        ),
        pytest.param(
            "batch_size=7",
            "batch_size=7 cannot be divided among 2 processes and accumulate=1 micro-batches",
            marks=SLOW,
        ),
    ],
)
def test_pipelines_of_one_process_refuse_several(tmp_path: Path, argument: str, words: str) -> None:
    ended = run_ranks(tmp_path, *(["pipeline=stage1"] * ("pipeline" not in argument)), argument)
    assert [each.status for each in ended] == [2, 2]
    assert "".join(each.err for each in ended).splitlines() == [words]


def test_a_sweep_is_not_started_twice(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, "-m", "seed=1,2")
    words = "-m: a sweep starts its own processes; run it without torchrun\n"
    assert [each.status for each in ended] == [2, 2] and "".join(each.err for each in ended) == words


def test_processes_without_a_meeting_place_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ended = command(str(tmp_path), [])
    assert ended == Ended(2, "", "WORLD_SIZE=2 without MASTER_ADDR: start the processes with torchrun\n")


@pytest.mark.parametrize(
    ("variable", "starter"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_processes_that_do_not_know_of_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, starter: str
) -> None:
    """Each would run the full job in the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "4")
    ended = command(str(tmp_path), ["run_dir=run"])
    assert ended.status == 2 and not list(tmp_path.iterdir())
    assert ended.err.startswith(f"{starter} has started 4 processes ({variable}) that cannot find each other: ")
    monkeypatch.setenv(variable, "1")
    assert command(str(tmp_path), ["steps=many"]).err == "steps=many: must be an integer of at least 0\n"


def test_processes_of_torchrun_in_a_step_of_srun_know_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    first, _ = run_ranks(tmp_path)
    assert first.status == 0, first.err


@SLOW
def test_torchrun_trains_both_stages_and_one_process_writes(tmp_path: Path) -> None:
    place = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", *place]
    starts = {"two": [*launcher, "-m", "vqf.run"], "one": ["-m", "vqf.run"]}
    said = {}
    for name, start in starts.items():
        arguments = [sys.executable, *start, *SMALL, f"run_dir={tmp_path / name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        assert ended.returncode == 0, ended.stderr
        said[name] = ended.stdout
    folders = {name: tmp_path / name for name in said}
    files = {name: sorted(str(path.relative_to(at)) for path in at.rglob("*")) for name, at in folders.items()}
    assert files["two"] == files["one"]
    assert said["two"].count("prior: ") == said["one"].count("prior: ") == 1
    assert "torchrun --nproc-per-node=2 -m vqf.run" in (folders["two"] / "summary.json").read_text()
    shards = [name for name in files["one"] if "/tokens/" in name and name.endswith(".safetensors")]
    assert len(shards) >= 2
    for name in shards:
        one, two = (load_file(folders[which] / name) for which in ("one", "two"))
        assert one.keys() == two.keys()
        assert one["tokens"].shape == two["tokens"].shape and torch.equal(one["labels"], two["labels"])

"""The command line from end to end: the folder of a run, exit codes, output."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from vqf.registry import KINDS, component_names
from vqf.run import main
from vqf.runs.run_dir import choose_run_dir

TOY = Path(__file__).parent / "support" / "toy.py"

Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: None, own_job: None) -> Run:
    """Run a command line with the toy pipeline in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def ran(*arguments: str) -> None:
        sys.modules.pop("toy", None)  # or it would not register again
        monkeypatch.setattr(sys, "argv", ["vqf", f"plugins=[{TOY}]", *arguments])
        main()

    return ran


def folders(base: Path = Path("outputs")) -> list[str]:
    return sorted(str(path.parent) for path in base.rglob("count"))


def test_a_run_writes_its_own_folder(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("pipeline=toy", "count=5", "model=vqvae", "model.quantizer.beta=0.5")
    (folder,) = folders()
    assert Path(folder).parent == Path("outputs/vqvae-emoji")
    assert sorted(path.name for path in Path(folder).iterdir()) == [".hydra", "count", "log.txt"]
    assert (Path(folder) / "count").read_text() == "5"
    assert OmegaConf.load(f"{folder}/.hydra/config.yaml").model.quantizer.beta == 0.5
    assert (Path(folder) / "log.txt").read_text().endswith("INFO the toy runs\n")
    assert capsys.readouterr().out == "the toy runs\n"


def test_runs_of_one_second_do_not_share_a_folder(run: Run) -> None:
    for _ in range(2):
        run("pipeline=toy")
    assert len(folders()) == 2


def test_run_dir_and_resume_choose_the_folder(run: Run) -> None:
    run("pipeline=toy", "run_dir=here/it")
    run("pipeline=toy")
    (first,) = folders()
    run("pipeline=toy", "count=2", "resume=true")
    assert folders() == [first] and Path(first, "count").read_text() == "2"
    Path("here/it/checkpoints/step-00000003").mkdir(parents=True)
    run("pipeline=toy", "count=3", "resume=here/it/checkpoints/step-00000003")
    run("pipeline=toy", "count=4", f"resume={first}")
    assert Path("here/it/count").read_text() == "3" and Path(first, "count").read_text() == "4"


@pytest.mark.parametrize("text", ["epoch=12", "Food & Drink", "jürgen/😀", "~/pictures", "[draft]", "1_000", "a(1)"])
def test_a_text_arrives_as_it_was_given(run: Run, text: str) -> None:
    run("pipeline=toy", f"do={text}")
    (folder,) = folders()
    assert OmegaConf.load(f"{folder}/.hydra/config.yaml").do == text


def test_a_path_may_have_any_letter_and_begin_at_home(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    run("pipeline=toy", "run_dir=~/lr=1 & ü b")
    assert folders(Path("home")) == ["home/lr=1 & ü b"]


def test_texts_can_be_swept(run: Run) -> None:
    run("-m", "pipeline=toy", 'do="a=1, b","~"', "run_dir=all")
    jobs = [OmegaConf.load(f"{folder}/.hydra/config.yaml").do for folder in folders(Path("all"))]
    assert jobs == ["a=1, b", "~"]


def test_a_mistake_ends_with_a_line_and_leaves_nothing_behind(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("pipeline=toy", "steps=many", "data=folder")
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "steps=many: must be an integer of at least 0",
        "data.root: data 'folder' (vqf.data.folder.Folder) needs a value; give data.root=...",
    ]
    assert said.out == "" and list(Path().iterdir()) == []


def test_a_plugin_that_is_not_there_ends_with_a_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("plugins=[nowhere.py]")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"plugins: no file 'nowhere.py' in {Path.cwd()}\n"


def test_a_mistake_found_late_ends_with_a_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("pipeline=toy", "do=refuse", "count=2")
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.err == "count=2: the toy wants another\n" and said.out == "the toy runs\n"
    (folder,) = folders()
    assert (Path(folder) / "log.txt").read_text().endswith("ERROR count=2: the toy wants another\n")


def test_a_sweep_runs_every_job_and_names_the_one_that_fails(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("pipeline=toy", "do=refuse", "count=1,2,3", "-m")
    assert caught.value.code == 2
    plugin = f"plugins=[{TOY}]"
    said = capsys.readouterr()
    assert said.err == f"#1 {plugin} pipeline=toy do=refuse count=2: count=2: the toy wants another\n"
    assert "#0 : " in said.out and said.out.count("the toy runs") == 2
    jobs = [Path(folder) for folder in folders()]
    assert [job.name for job in jobs] == ["0", "1"]
    assert jobs[0].parent == jobs[1].parent and jobs[0].parent.parent == Path("outputs/sweeps")


def test_a_sweep_writes_into_its_run_dir(run: Run) -> None:
    run("-m", "pipeline=toy", "count=4,6", "run_dir=all")
    assert [Path(folder, "count").read_text() for folder in folders(Path("all"))] == ["4", "6"]


@pytest.mark.parametrize(("do", "bug"), [("break", IndexError), ("misread", ConfigAttributeError)])
def test_a_bug_is_not_reported_as_a_mistake(run: Run, do: str, bug: type[Exception]) -> None:
    with pytest.raises(bug):
        run("pipeline=toy", f"do={do}")


def test_what_is_left_out_is_empty_or_null_for_the_pipeline(run: Run) -> None:
    run("pipeline=toy", "do=look", "metric=[]", "model/loss=[]", "~data")
    assert len(folders()) == 1


def test_help_lists_every_group_and_name(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for kind, facts in KINDS.items():
        (listed,) = [line for line in lines if line.startswith(f"{facts.group}: ")]
        assert set(component_names(kind)) <= set(listed.removeprefix(f"{facts.group}: ").split(", "))
    assert "toy" in component_names("pipeline")
    assert any(line.startswith("experiment: ") for line in lines)
    assert list(Path().iterdir()) == []


def facts(folder: Path, pipeline: str) -> Path:
    """A folder that a run of a pipeline wrote."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "hydra.yaml").write_text(
        json.dumps({"hydra": {"runtime": {"choices": {"pipeline": pipeline}}}})
    )
    return folder


def test_resume_continues_the_newest_run_of_the_same_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("outputs/vqgan-ffhq")
    old, new, samples = facts(base / "1", "stage1"), facts(base / "2", "stage1"), facts(base / "3", "sample")
    (base / "4").mkdir()
    facts(Path("outputs/other-ffhq") / "5", "stage1")
    assert choose_run_dir(None, None, True, "vqgan-ffhq", "stage1") == str(new)
    assert choose_run_dir(None, None, True, "vqgan-ffhq", "sample") == str(samples)
    fresh = Path(choose_run_dir(None, None, True, "vqgan-ffhq", "stage2"))
    assert fresh.parent == base and not fresh.exists()
    assert Path(choose_run_dir(None, None, False, "vqgan-ffhq", "stage1")) not in (old, new)
    assert choose_run_dir("mine", None, True, "vqgan-ffhq", "stage1") == "mine"


@pytest.mark.parametrize("left", ["", "hydra:\n  runtime:\n    choices:\n      pipe", "hydra: [", "\x00\xff"])
def test_resume_finds_a_run_of_which_half_of_hydras_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("outputs/vqgan-ffhq")
    run = facts(base / "1", "full")
    (run / ".hydra" / "hydra.yaml").write_bytes(left.encode("latin-1"))
    config = run / "stage1" / "checkpoints" / "step-00000010" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("pipeline: {name: full}")
    assert choose_run_dir(None, None, True, "vqgan-ffhq", "full") == str(run)
    assert choose_run_dir(None, None, True, "vqgan-ffhq", "stage1") != str(run)


@pytest.mark.parametrize("inside", ["", "checkpoints/step-00000010"])
def test_a_pipeline_with_run_writes_beside_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "small-ffhq" / "now"
    for spelling in (run / inside, (run / inside).relative_to(tmp_path)):
        assert Path(choose_run_dir(None, str(spelling), False, "a-b", "sample")).parent == Path("outputs/small-ffhq")
    assert Path(choose_run_dir(None, "elsewhere/run", False, "a-b", "sample")).parent == Path("outputs/a-b")


class Process:
    """`python -m vqf.run` in a separate process and folder."""

    def __init__(self, folder: Path, arguments: Sequence[str], stdout: IO[bytes] | int = subprocess.PIPE) -> None:
        folder.mkdir()
        self.folder = folder
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "vqf.run", f"plugins=[{TOY}]", "pipeline=toy", *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for the process; returns exit code, stdout and stderr."""
        out, err = self.popen.communicate(timeout=120)
        return self.popen.returncode, out, err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["--info", "config"], ["count=1"], ["-m", "count=1,2"], ["do=refuse"]]
)
def test_a_command_whose_output_nobody_reads_ends_quietly(tmp_path: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        process = Process(tmp_path / "it", arguments, stdout=closed)
    status, _, err = process.end()
    assert (status, err) == (141, "")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """Several commands at once, since each spends seconds on importing torch."""
    base = tmp_path_factory.mktemp("processes")
    commands = {"bug": ["do=break"], "refusal": ["do=refuse", "count=2"], "long": ["do=wait"]}
    started = {name: Process(base / name, arguments) for name, arguments in commands.items()}
    yield started
    for each in started.values():
        each.popen.kill()
        each.popen.wait()


def test_a_bug_keeps_its_whole_traceback(processes: dict[str, Process]) -> None:
    status, _, err = processes["bug"].end()
    assert status == 1
    assert "Traceback (most recent call last)" in err and f'File "{TOY}"' in err
    assert err.endswith('raise IndexError("a bug")\nIndexError: a bug\n')


def test_a_mistake_has_no_traceback(processes: dict[str, Process]) -> None:
    assert processes["refusal"].end() == (2, "the toy runs\n", "count=2: the toy wants another\n")


def test_control_c_ends_with_a_line(processes: dict[str, Process]) -> None:
    process = processes["long"]
    assert process.popen.stdout is not None
    while process.popen.stdout.readline() != "waiting\n":
        time.sleep(0.01)
    process.popen.send_signal(signal.SIGINT)
    assert process.end() == (130, "", "interrupted\n")
